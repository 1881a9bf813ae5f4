"""Arrays of the oracle in float64, streams as `[T, n, C]`, and the roundings that definitions have."""

import numpy as np

FLOAT32 = 2e-6
"""Relative error of a sum in float32: near the middle of two numbers it cannot tell the nearer one."""


def round_tf32(x):
    """Round to nearest even on the 10 mantissa bits of TF32, by integer arithmetic on float32."""
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    keep = 13  # float32 has 23 mantissa bits
    half_even = (1 << (keep - 1)) - 1 + ((bits >> keep) & 1)
    bits = ((bits + half_even) >> keep) << keep
    return bits.astype(np.uint32).view(np.float32)


def round_bits(x, bits, other=False):
    """Round float64 to nearest even on `bits` significant bits: 8 of bfloat16, 11 of TF32.

    With `other`, numbers so near the middle of two that float32 cannot tell the nearer go to the other one.
    """
    mantissa, exponent = np.frexp(np.asarray(x, np.float64))
    mantissa = np.ldexp(mantissa, bits)
    found = np.rint(mantissa)
    if other:
        beyond = mantissa - found
        tied = np.abs(beyond) > 0.5 - np.ldexp(FLOAT32, bits)
        found += np.where(tied, np.sign(beyond), 0)
    return np.ldexp(found, exponent - bits)


def is_bf16(x):
    return np.asarray(x).dtype.name == "bfloat16"


def f64(*arrays):
    return [np.asarray(a, np.float64) for a in arrays]


def by_stream(x, n):
    return np.asarray(x, np.float64).reshape(len(x), n, -1)
