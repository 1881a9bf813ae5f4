"""Settings of every test."""

import tempfile

import jax

# Mixing ranks without saying so is how a [T] and a [T, n] array broadcast into nonsense.
jax.config.update("jax_numpy_rank_promotion", "raise")

# Tests of restart and of bad batches run the same program again; compiling it is most of their time.
_cache = tempfile.TemporaryDirectory()
jax.config.update("jax_compilation_cache_dir", _cache.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
