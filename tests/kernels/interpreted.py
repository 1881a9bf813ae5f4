"""Names of kernels_pallas/testing/case.py as tests of a single operation import them."""

import functools

from kernels_pallas.testing.case import BF16, F32, normal, value_and_cotangents

__all__ = ["BF16", "F32", "normal", "value_and_vjp"]


def value_and_vjp(op, implementation):
    """Compiled function (args, cotangent) -> leaves of the outputs of `op` and the cotangents of args."""
    return value_and_cotangents(functools.partial(op, implementation=implementation))
