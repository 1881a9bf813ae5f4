"""`read` and `boundary` on TPU: one kernel a direction, in which a token's row stays in VMEM.

The forward of `boundary` does F_post,res, the projection of the new streams, their coefficients and F_pre. At
n = 4 it moves 10C a token (x, y in, new x and layer input out); separate kernels move 18C. `read` does the
same without F_post,res, 5C instead of 9C. The backward of `read` makes dh_pre, the coefficients, dphi and
every cotangent of the
streams: 13C (x, g, d in, dx out). The backward of `boundary` goes through F_post,res too: 19C (x before and
after, y, g, d in, dx, dy out) instead of 13C + 14C. The cotangent of the new streams never leaves VMEM. It
waits there in the dtype of the streams; for bfloat16 that is a rounding that the definition does not have.

If asked for, the RMSNorm of the layer input is part of these kernels. It moves nothing more, because a
token's whole row is in VMEM.

Sinkhorn runs once for a window of up to 1024 tokens, whose coefficients fill whole registers: forward after
the window's blocks (`tpu_blocks`), backward before them. The layer input needs h_pre alone, and the
cotangents of h_post and h_res are known before any pass over the streams.
"""

import jax

from kernels_pallas.boundary import tpu_blocks as blocks
from kernels_pallas.boundary.contract import ReadStatic, Update
from kernels_pallas.boundary.tpu_backward import backward, read_backward
from kernels_pallas.boundary.tpu_forward import forward, read_forward
from kernels_pallas.shapes import check_kernel_dtype, check_kernel_n
from kernels_pallas.sinkhorn import tpu as sinkhorn

__all__ = ["backward", "check", "forward", "read_backward", "read_forward"]


def check(first: jax.Array | Update, *_, static: ReadStatic) -> None:
    """Raises NotImplementedError unless the kernels accept dtype, n, width and options."""
    streams, n = jax.tree.leaves(first)[0], static.n
    check_kernel_dtype(streams.dtype)
    check_kernel_n(n)
    sinkhorn.check_iterates(n, static.num_iterations)
    row, dtype = streams.shape[-1], streams.dtype
    blocks.forward_tokens(row, n, dtype, fused=True)
    blocks.backward_tokens(row, n, dtype, static.num_iterations, fused=False)
