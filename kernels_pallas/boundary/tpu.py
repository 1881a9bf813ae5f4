"""`read` and `boundary` on TPU: a token's row stays in VMEM between the parts, one kernel a direction.

Forward: F_post,res, the projection of the new streams, their coefficients and F_pre move 10C a token at n = 4
(x, y in, new x and layer input out) where the separate kernels move 18C; `read` is the same without
F_post,res, 5C for 9C. Backward of `read`: dh_pre, the coefficients, dphi and every cotangent of the streams,
13C (x, g, d in, dx out). Backward of `boundary`: F_post,res as well, 19C (x before and after, y, g, d in,
dx, dy out) for 13C + 14C; the cotangent of what F_post,res wrote never leaves VMEM. It waits there in the
dtype of the streams: with bfloat16 streams one rounding more than the definition has.

The RMSNorm of the layer input, if asked for, is part of the same kernels in both directions: nothing more is
moved, since a token's row is in VMEM as a whole.

Sinkhorn runs once for a window of up to 1024 tokens, whose coefficients fill whole registers: after the
window's blocks (`tpu_blocks`) forward, before them backward. The layer input needs h_pre alone, and the
cotangents of h_post and h_res are known before any pass over the streams.
"""

from kernels_pallas import pallas_call
from kernels_pallas.boundary import tpu_blocks as blocks
from kernels_pallas.boundary.tpu_backward import backward, read_backward
from kernels_pallas.boundary.tpu_forward import forward, read_forward
from kernels_pallas.sinkhorn import tpu as sinkhorn

__all__ = ["backward", "check", "forward", "read_backward", "read_forward"]


def check(streams, *args, n, num_iterations, norm_eps, input_norm_eps):
    """Raises NotImplementedError for a dtype, n, width or option that the kernels do not take."""
    pallas_call.check_dtypes(streams, n)
    sinkhorn.check_iterates(n, num_iterations)
    width, dtype = streams.shape[-1], streams.dtype
    blocks.forward_tokens(width, n, dtype, fused=True)
    blocks.backward_tokens(width, n, dtype, num_iterations, fused=False)
