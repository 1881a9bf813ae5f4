"""The version of the distribution mhc_jax, which holds both packages. This is its one place."""

__version__ = "0.2.0.dev0"
