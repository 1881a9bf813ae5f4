"""The version of the distribution mhc_jax, which holds both packages. This is its one place."""

__version__ = "0.1.0"
