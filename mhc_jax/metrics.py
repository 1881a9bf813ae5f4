"""The older name of `mhc_jax.writers`."""

from mhc_jax.writers import MetricWriter, jsonable

__all__ = ["MetricWriter", "jsonable"]
