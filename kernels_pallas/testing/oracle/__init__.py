"""float64 NumPy oracle of every operation and its gradient; shares no code with the package.

It is written for clarity, on `[T, n, C]` arrays with einsum, and with Sinkhorn-Knopp in the log domain
throughout. (The package keeps streams flat and iterates on sums.) Gradients are derived by hand; a test
checks them against central differences.

For bfloat16 streams it makes the roundings that belong to a definition: the new streams of `boundary` before
they are read, ds to TF32, and in `read` and `boundary` the cotangent behind the norm of the layer input
before it is multiplied with h_pre; in `look_ahead` the weighted sum before its norm, and the layer input in
the norm's backward. phi is used as given, so round it to TF32 first. Results are not rounded;
`error` allows for that.

`maps` makes mappings, `passes` applies them to streams, `fused` does both at once, `arrays` rounds, and
`judging` says how far an implementation may be off. All names are here.
"""

from kernels_pallas.testing.oracle.arrays import (
    FLOAT32,
    is_bf16,
    round_bits,
    round_tf32,
)
from kernels_pallas.testing.oracle.fused import (
    HC,
    LOGITS,
    MAPPINGS,
    boundary,
    boundary_logits,
    boundary_logits_vjp,
    boundary_vjp,
    hc_boundary,
    hc_boundary_vjp,
    hc_read,
    hc_read_vjp,
    look_ahead,
    look_ahead_vjp,
    read,
    read_logits,
    read_logits_vjp,
    read_vjp,
)
from kernels_pallas.testing.oracle.judging import (
    CANCELLING,
    LEAVES,
    ROUNDED,
    SUMS,
    TIES,
    error,
    judge,
    limits,
)
from kernels_pallas.testing.oracle.maps import (
    coefficients,
    coefficients_vjp,
    hc_mappings,
    hc_mappings_vjp,
    logits,
    logits_vjp,
    mappings,
    mappings_vjp,
    projection,
    projection_vjp,
    sinkhorn,
    sinkhorn_vjp,
    stream_projection,
    stream_projection_vjp,
)
from kernels_pallas.testing.oracle.passes import (
    post_res,
    post_res_vjp,
    pre,
    pre_normed,
    pre_normed_vjp,
    pre_vjp,
    rms_norm,
    rms_norm_vjp,
)

__all__ = [
    "CANCELLING",
    "FLOAT32",
    "HC",
    "LEAVES",
    "LOGITS",
    "MAPPINGS",
    "ROUNDED",
    "SUMS",
    "TIES",
    "boundary",
    "boundary_logits",
    "boundary_logits_vjp",
    "boundary_vjp",
    "coefficients",
    "coefficients_vjp",
    "error",
    "hc_boundary",
    "hc_boundary_vjp",
    "hc_mappings",
    "hc_mappings_vjp",
    "hc_read",
    "hc_read_vjp",
    "is_bf16",
    "judge",
    "limits",
    "logits",
    "logits_vjp",
    "look_ahead",
    "look_ahead_vjp",
    "mappings",
    "mappings_vjp",
    "post_res",
    "post_res_vjp",
    "pre",
    "pre_normed",
    "pre_normed_vjp",
    "pre_vjp",
    "projection",
    "projection_vjp",
    "read",
    "read_logits",
    "read_logits_vjp",
    "read_vjp",
    "rms_norm",
    "rms_norm_vjp",
    "round_bits",
    "round_tf32",
    "sinkhorn",
    "sinkhorn_vjp",
    "stream_projection",
    "stream_projection_vjp",
]
