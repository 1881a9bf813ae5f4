"""The older name of `mhc_jax.checkpoint.trained`."""

from mhc_jax.checkpoint.trained import Source, load

__all__ = ["Source", "load"]
