"""Training loss, with or without ever holding all logits."""

import functools

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from mhc_jax import sharding


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean negative log-likelihood in nats a token: logits `[..., V]` float32, targets `[...]`."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


@jax.custom_vjp
def unembed(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """Logits `[..., V]` float32 of x `[..., C]`, products in the dtype of x in both directions.

    The cotangent of the logits is rounded to the dtype of x: left in float32 it would turn both products of
    the backward into float32 ones (TF32 on GPUs, half the rate) and be written at twice the size. The
    gradient of the matrix is summed in float32.
    """
    return jnp.dot(x, matrix.astype(x.dtype), preferred_element_type=jnp.float32)


def _unembed_forward(x, matrix):
    return unembed(x, matrix), (x, matrix)


def _unembed_backward(residuals, d_logits):
    x, matrix = residuals
    d_logits = d_logits.astype(x.dtype)
    dx = jnp.einsum("...v,cv->...c", d_logits, matrix.astype(x.dtype))
    d_matrix = jnp.einsum("...c,...v->cv", x, d_logits, preferred_element_type=jnp.float32)
    return dx, d_matrix.astype(matrix.dtype)


unembed.defvjp(_unembed_forward, _unembed_backward)


def linear_cross_entropy(
    x: jax.Array, matrix: jax.Array, targets: jax.Array, chunks: int
) -> jax.Array:
    """`cross_entropy(unembed(x, matrix), targets)` with the logits of 1/chunks of the tokens at a time.

    With a vocabulary of 129280 the logits of 16384 tokens are 8 GiB, and their gradient as much again. In
    chunks the backward pass computes them once more, and sums the matrix' gradient in float32. Over a mesh
    every device cuts its own tokens, and the matrix is gathered and its gradient summed once.

    Args:
      x: `[B, S, C]`.
      matrix: `[C, V]`.
      targets: `[B, S]` int32.
      chunks: divides the tokens of a device.

    Raises:
      ValueError: chunks does not divide the tokens of a device.
    """
    if chunks == 1:
        return cross_entropy(unembed(x, matrix), targets)
    matrix = matrix.astype(x.dtype)  # before it is gathered
    mesh, spec = sharding.token_spec(targets.shape)
    if mesh is None:
        return _sum(x, matrix, targets, chunks) / targets.size

    def local(x, matrix, targets):
        return _sum(x, matrix, targets, chunks)[None, None]

    axes = frozenset(sharding.BATCH_AXES) | {"sequence"}
    sums = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(spec, PartitionSpec(), spec),
        out_specs=spec,
        axis_names=axes,  # the vocabulary stays split over the others
        check_vma=False,
    )(x, matrix, targets)
    return sums.sum() / targets.size


def _sum(x, matrix, targets, chunks):
    """Sum of the negative log-likelihoods of all tokens, float32."""
    x, targets = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    if targets.size % chunks:
        raise ValueError(
            f"model.loss_chunks={chunks} does not divide the {targets.size} tokens of a device: use a "
            "power of two"
        )
    matrix = matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))  # of its gradient's sum

    @functools.partial(
        jax.checkpoint, prevent_cse=False
    )  # in a scan there is nothing to merge with
    def body(total, part):
        x, targets = part
        nll = optax.softmax_cross_entropy_with_integer_labels(unembed(x, matrix), targets)
        return total + nll.sum(), None

    parts = x.reshape(chunks, -1, x.shape[-1]), targets.reshape(chunks, -1)
    return jax.lax.scan(body, jnp.zeros((), jnp.float32), parts)[0]
