"""Differentiable operations of hyper-connections: one definition each, a backend per platform.

`streams` is the widened residual state of the paper, kept flat: `[..., n*C]`, stream i in columns
`i*C:(i+1)*C`. Coefficients (`h_pre`, `h_post`, `h_res`) are float32 whatever the dtype of the streams.
"""

from kernels_pallas.boundary import boundary, read
from kernels_pallas.mappings import coefficients, mappings
from kernels_pallas.post_res import post_res
from kernels_pallas.pre import pre
from kernels_pallas.projection import projection
from kernels_pallas.sinkhorn import sinkhorn

__all__ = [
    "boundary",
    "coefficients",
    "mappings",
    "post_res",
    "pre",
    "projection",
    "read",
    "sinkhorn",
]
