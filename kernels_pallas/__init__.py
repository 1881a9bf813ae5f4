"""Differentiable operations of hyper-connections: one definition each, a backend per platform.

`streams` is the widened residual state of the paper, kept flat: `[..., n*C]`, stream i in columns
`i*C:(i+1)*C`. Coefficients (`h_pre`, `h_post`, `h_res`) are float32 whatever the dtype of the streams, and
mappings and parameters of another floating dtype are converted to it. Under jax_enable_x64 "xla" takes
float64 streams too, and coefficients are then float64.

Every operation takes `implementation`: None, the best that the platform has, or one of `IMPLEMENTATIONS`.

- "xla": plain jnp, the definition. Runs everywhere.
- "pallas": Pallas kernels for TPUs.
- "triton": Triton kernels for NVIDIA GPUs, Triton alone.
- "cuda": `read`, `boundary`, their forms and `look_ahead` on NVIDIA GPUs, with their large passes in CUDA
  C++ and their small kernels in Triton.

A named one runs or raises NotImplementedError; it never means another. Names by operation are text, as a
configuration holds it: "boundary=cuda,sinkhorn=triton"; operations that it leaves out take None. `explain`
says which one None takes, and why not the others.

On a mesh, trace the program inside `token_sharding(mesh, "data")`: every kernel then runs per device on its
own tokens, and gradients of parameters are summed over the axes that split tokens.
"""

from kernels_pallas.boundary import boundary, read
from kernels_pallas.coefficients import coefficients
from kernels_pallas.dispatch import IMPLEMENTATIONS
from kernels_pallas.explain import explain
from kernels_pallas.hc import hc_boundary, hc_read
from kernels_pallas.logits import boundary_logits, read_logits
from kernels_pallas.look_ahead import look_ahead
from kernels_pallas.mappings import mappings
from kernels_pallas.post_res import post_res
from kernels_pallas.pre import pre
from kernels_pallas.projection import projection
from kernels_pallas.sharding import token_sharding
from kernels_pallas.sinkhorn import sinkhorn
from kernels_pallas.version import __version__

__all__ = [
    "IMPLEMENTATIONS",
    "__version__",
    "boundary",
    "boundary_logits",
    "coefficients",
    "explain",
    "hc_boundary",
    "hc_read",
    "look_ahead",
    "mappings",
    "post_res",
    "pre",
    "projection",
    "read",
    "read_logits",
    "sinkhorn",
    "token_sharding",
]
