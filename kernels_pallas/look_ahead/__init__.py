"""Write, layer input and projection in one pass over the streams: a read whose h_pre is known beforehand.

In `boundary` the layer input waits for the projection of the same streams: h_pre needs the whole row. Here
h_pre comes from the sublayer before (look-ahead pre, the single-pass form of mHC), and a row is read once:

    x' = h_res x + h_post y         the write of the sublayer before
    u  = h_pre x'                   h_pre as that sublayer has predicted it
    s  = x' phi,  r                 next_pre, and h_post and h_res of this sublayer

The backward needs only small arrays before its pass too, since dh_pre = <x', du> is a sum of that pass.

Least traffic at n = 4, in elements a token over C (1C = 2TC bytes of bfloat16):

| | forward | backward | |
|---|---|---|---|
| `look_ahead` | x, y in, x', u out: 10C | x, y, g, d in, dx, dy out: 15C | 25C |
| with the norm of the layer input | and 2C | and 2C | 29C |
| `boundary`, its h_pre found on the way | 9C + 5C | 5C + 15C | 34C |
| with the norm of the layer input | the same | the same | 34C |

That is what "cuda" moves, where nothing is held on chip. Here a norm is a second pass over u and over its
cotangent, because it needs a sum over the row: forward u in, the normed u out; backward the layer input and d
in, for their inner product. `boundary` finds these sums in the pass that h_pre and dh_pre need.
"""

import jax

from kernels_pallas import conventions, placement
from kernels_pallas.boundary import check_parameters
from kernels_pallas.boundary.contract import Parameters, ReadStatic, Update
from kernels_pallas.boundary.differentiable import writing
from kernels_pallas.look_ahead import reference
from kernels_pallas.look_ahead.contract import Known
from kernels_pallas.shapes import check_floating, check_shape, check_streams, check_update

_look_ahead = writing("look_ahead", reference)


def look_ahead(
    streams: jax.Array,
    layer_output: jax.Array,
    h_post: jax.Array,
    h_res: jax.Array,
    h_pre: jax.Array,
    phi: jax.Array,
    bias: jax.Array,
    alpha: jax.Array,
    *,
    n: int,
    num_iterations: int = 20,
    sinkhorn_eps: float = 0.0,
    last: str = "rows",
    pre_eps: float = 0.0,
    norm_eps: float = 1e-20,
    phi_precision: str = "tf32",
    input_norm_weight: jax.Array | None = None,
    input_norm_eps: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """The write of one sublayer, the read of the next with a known h_pre, and that sublayer's mappings.

    Equivalent to the following, where `phi`, `bias`, `alpha` are those of the sublayer that reads:

        new_streams = post_res(streams, layer_output, h_post, h_res)
        layer_input = rms_norm(pre(new_streams, h_pre))  # the norm if asked for
        next_pre, h_post, h_res = mappings(new_streams, phi, bias, alpha, n=n)

    Everything reads `new_streams` after they are rounded to their dtype, and the norm reads the weighted sum
    after that is. The cotangent of the new streams is summed in float32 and not rounded before it goes
    through the write. "triton" and "pallas" do round it there, to the dtype of the streams: with bfloat16 a
    relative error of 2e-3 in dh_post and dh_res, and a second rounding in dx and dy. "cuda" rounds it in the
    sums of dh_post and dh_res alone.

    Args:
      streams, layer_output, h_post, h_res: the pending update, as in `post_res`.
      h_pre: `[..., n]` float32, `next_pre` of the sublayer before.
      phi, bias, alpha, n, num_iterations, sinkhorn_eps, last, pre_eps, norm_eps, phi_precision: of the
        sublayer that reads, as in `read`; the columns pre make `next_pre`.
      input_norm_weight, input_norm_eps: RMSNorm of the layer input, as in `read`.
      implementation: None (the best of the platform) or a name, see `kernels_pallas`.

    Returns:
      layer input `[..., C]` in the dtype of the streams; next_pre `[..., n]`, h_post `[..., n]` and h_res
      `[..., n, n]` float32; all of the sublayer that reads; and the new streams `[..., n*C]`.

    Raises:
      ValueError: shapes that do not fit, a number out of its range, or an unknown name.
      TypeError: no array, streams of another dtype, a layer_output of another than theirs, another array that
        is not floating, or no number.
      NotImplementedError: the named implementation cannot run here.
    """
    width = check_streams(streams, n)
    check_update(streams, layer_output, h_post, h_res, n)
    check_floating(h_pre=h_pre)
    check_shape("h_pre", h_pre, (*streams.shape[:-1], n))
    parameters = Parameters(phi, bias, alpha, input_norm_weight)
    static = ReadStatic(n, num_iterations, norm_eps, input_norm_eps, sinkhorn_eps, pre_eps)
    parameters, static = check_parameters(streams, width, parameters, phi_precision, static, last)
    dtype = parameters.phi.dtype
    update = Update(streams, layer_output, h_post.astype(dtype), h_res.astype(dtype))
    known, parameters = placement.aligned(
        reference.forward, known=Known(update, h_pre.astype(dtype)), parameters=parameters
    )
    if last == "columns":  # the transpose of a matrix whose rows are last
        phi, bias = (conventions.transposed_columns(x, n) for x in parameters[:2])
        parameters = parameters._replace(phi=phi, bias=bias)
    out, new_streams = _look_ahead(known, parameters, static, implementation)
    if last == "columns":
        out = out._replace(h_res=conventions.transposed(out.h_res))
    return *out, new_streams
