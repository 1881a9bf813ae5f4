"""Coefficients from the projection in Triton: a few floats a token, one thread a row of h_res.

The kernels are in triton_forward.py and triton_backward.py; the fused operations use them too. The forward
can begin with the partial sums of a projection that was split over K. The backward can end with the operands
of the projection's backward.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.coefficients.triton_backward import backward_launch, parameter_gradients
from kernels_pallas.coefficients.triton_forward import forward_launch
from kernels_pallas.gpu import device
from kernels_pallas.shapes import check_kernel_n
from kernels_pallas.sinkhorn import triton as sinkhorn


def check(s: jax.Array, *_, n: int, num_iterations: int, **__) -> None:
    """Raises NotImplementedError for n other than 2, 4, 8, for float64 or too many iterations."""
    check_kernel_n(n)
    if s.dtype != jnp.float32:
        raise NotImplementedError(f"{s.dtype} coefficients: the Triton kernels take float32")
    sinkhorn.check_iterations(num_iterations)


def forward(
    s: jax.Array,
    r: jax.Array,
    bias: jax.Array,
    alpha: jax.Array,
    *,
    n: int,
    num_iterations: int,
    **eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Maps s [..., n*n+2n], r [...] -> h_pre [..., n], h_post [..., n], h_res [..., n, n]."""
    shapes = ((*r.shape, n), (*r.shape, n), (*r.shape, n, n))
    T = device.num_tokens(r.shape)
    if T:
        outputs = forward_launch(T, n, num_iterations, **eps)(s, r, bias, alpha, T)
    else:
        outputs = device.empty_like(*((shape, s.dtype) for shape in shapes))
    h_pre, h_post, h_res = (out.reshape(shape) for out, shape in zip(outputs, shapes))
    return h_pre, h_post, h_res


def forward_of_sums(
    sums, bias, alpha, *, K, n, num_iterations, norm_eps, sinkhorn_eps, pre_eps
) -> tuple[jax.Array, ...]:
    """Does `forward` from partial sums of the projection of K columns, `projection.gpu.partial_sums`; T > 0.

    Returns:
      h_pre [T, n], h_post [T, n], h_res [T, n, n], s [T, m], r [T].
    """
    splits, T, stride = sums.shape
    launch = forward_launch(
        T,
        n,
        num_iterations,
        K=K,
        eps=norm_eps,
        splits=splits,
        stride=stride,
        sinkhorn_eps=sinkhorn_eps,
        pre_eps=pre_eps,
    )
    return launch(sums, sums, bias, alpha, T)


def backward(
    s: jax.Array,
    r: jax.Array,
    bias: jax.Array,
    alpha: jax.Array,
    dh_pre: jax.Array,
    dh_post: jax.Array,
    dh_res: jax.Array,
    *,
    n: int,
    num_iterations: int,
    sinkhorn_eps: float = 0.0,
    pre_eps: float = 0.0,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the cotangents (ds, dr, dbias, dalpha); the last two summed over all tokens."""
    del pre_eps  # a constant beside the sigmoid
    T = device.num_tokens(r.shape)
    if not T:
        return s, r, jnp.zeros_like(bias), jnp.zeros_like(alpha)
    args = (s, r, bias, alpha, dh_pre, dh_post, dh_res)
    options = {"n": n, "num_iterations": num_iterations, "sinkhorn_eps": sinkhorn_eps}
    ds, dr, sums = backward_to_projection(*args, round_ds=False, **options)
    return ds.reshape(s.shape), dr.reshape(r.shape), *parameter_gradients(sums)


def backward_to_projection(
    s, r, bias, alpha, dh_pre, dh_post, dh_res, *, round_ds, n, num_iterations, sinkhorn_eps
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Does `backward` but for the second stage: ds [T, m], dr [T], sums [m + 3, programs]; T > 0.

    Args:
      s, r, bias, alpha, dh_pre, dh_post, dh_res: as in `backward`.
      round_ds: to TF32, as the projection's backward wants it of bfloat16 streams.
      n, num_iterations, sinkhorn_eps: as in `backward`.
    """
    T = device.num_tokens(r.shape)
    options = {"round_ds": round_ds, "sinkhorn_eps": sinkhorn_eps}
    launch = backward_launch(T, n, num_iterations, **options)
    ds, dr, sums, _ = launch(s, r, bias, alpha, dh_pre, dh_post, dh_res, T)
    return ds, dr, sums


class Fragments(NamedTuple):
    """What goes back to the streams, as boundary/backward.cu reads it (n = 4).

    Attributes:
      ds: rounded to TF32, in the order of the lanes, `[tiles, 3, 32, 4]` float32.
      pairs: high and low terms of the same, `[tiles, 3, 32, 8]` bfloat16.
      kappa: the factor of the streams, dr / (r K), `[T]`.
      kappa_pre: its share from dh_pre, which `kappa` then lacks; None with look-ahead.
    """

    ds: jax.Array
    pairs: jax.Array
    kappa: jax.Array
    kappa_pre: jax.Array | None = None


def backward_to_fragments(
    s, r, bias, alpha, dh_pre, dh_post, dh_res, *, K, n, num_iterations, sinkhorn_eps
) -> tuple[Fragments, jax.Array]:
    """Does `backward_to_projection` for a projection of K columns in CUDA; T > 0."""
    T = device.num_tokens(r.shape)
    options = {"round_ds": True, "fragments": K, "sinkhorn_eps": sinkhorn_eps}
    launch = backward_launch(T, n, num_iterations, **options)
    ds, kappa, sums, pairs = launch(s, r, bias, alpha, dh_pre, dh_post, dh_res, T)
    return Fragments(ds, pairs, kappa), sums
