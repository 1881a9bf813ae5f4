"""Computes the training loss, with all logits at once or in chunks."""

import functools
import numbers

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from kernels_pallas import placement
from kernels_pallas.derivatives import custom_vjp
from kernels_pallas.opaque import opaque
from kernels_pallas.precision import wide_dtype
from kernels_pallas.shapes import check_array, check_floating
from kernels_pallas.varying import as_varying, varying_axes
from mhc_jax import sharding

# The target of a token that does not count, as in torch and transformers.
IGNORE_INDEX = -100


def unembed(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """Returns logits `[..., V]` float32 of x `[..., C]` and a float32 matrix `[C, V]`.

    Products are in the dtype of x in both directions. The cotangent of the logits is rounded to the dtype of
    x: a float32 cotangent would make both products of the backward float32 (TF32 on GPUs, half the rate) and
    take twice the memory. The gradient of the matrix is summed in float32.
    """
    return placement.automatic(_unembed, x, matrix, splits=True)


@custom_vjp
def _unembed(x, matrix):
    return jnp.dot(x, matrix.astype(x.dtype), preferred_element_type=wide_dtype(x.dtype))


def _unembed_forward(x, matrix):
    return _unembed(x, matrix), (x, matrix)


def _unembed_gradients(x, matrix, d_logits):
    """Returns the gradients of x in its dtype and of the matrix in float32."""
    d_logits = d_logits.astype(x.dtype)
    dx = jnp.einsum("...v,cv->...c", d_logits, matrix.astype(x.dtype))
    wide = wide_dtype(x.dtype)
    return dx, jnp.einsum("...c,...v->cv", x, d_logits, preferred_element_type=wide)


def _unembed_backward(residuals, d_logits):
    dx, d_matrix = _unembed_gradients(*residuals, d_logits)
    return dx, d_matrix.astype(residuals[1].dtype)


_unembed.defvjp(_unembed_forward, _unembed_backward)


def num_counted(targets: jax.Array, ignore_index: int = IGNORE_INDEX) -> jax.Array:
    """Returns how many targets count, int32 `[]`: all but those equal to `ignore_index`."""
    return jnp.sum(targets != ignore_index, dtype=jnp.int32)


def linear_cross_entropy(
    x: jax.Array,
    matrix: jax.Array,
    targets: jax.Array,
    chunks: int,
    *,
    ignore_index: int = IGNORE_INDEX,
) -> jax.Array:
    """Returns the mean negative log-likelihood in nats per token, with a part of the logits at a time.

    It is the mean of optax.softmax_cross_entropy_with_integer_labels(unembed(x, matrix), targets) over the
    tokens whose target is not `ignore_index`. A target outside the vocabulary makes the loss and all
    gradients NaN, also one from -V to -1, which optax counts from the end. Where no target counts, the loss
    and the gradients are 0.

    With a vocabulary of 129280 the logits of 16384 tokens are 8 GiB, and their gradient half as much. When
    it is differentiated, each chunk computes its gradients together with its logits, as Liger-Kernel does
    (Hsu et al., 2024, arXiv 2410.10989). So logits are computed once for any number of chunks, and the
    backward pass keeps as much as x and the matrix. Without differentiation only the loss is computed.

    It has no forward-mode derivative (`jax.jvp`, `jax.hessian`). Rounding is that of `unembed`: products in
    the dtype of x, the gradient of the logits rounded to it, that of the matrix summed in float32. Over a
    mesh every device cuts its own tokens into chunks; the matrix is gathered once and its gradient is
    summed once. `jax.vmap` may name any axis of the mesh as its `spmd_axis_name`.

    Args:
      x: `[B, S, C]`, bfloat16 or float32.
      matrix: `[C, V]` float32.
      targets: `[B, S]` integers, 0 to V - 1 or `ignore_index`.
      chunks: divides the tokens of a device.
      ignore_index: target of tokens that do not count; their x may be anything, infinite and NaN too.

    Returns:
      float32 `[]`.

    Raises:
      ValueError: arrays of other shapes, or chunks does not divide the tokens of a device.
      TypeError: x or matrix is not floating, targets are no integers.
    """
    _check(x, matrix, targets, chunks)
    targets = _as_int32(targets)
    return placement.automatic(
        functools.partial(_loss, (chunks, ignore_index)), x, matrix, targets, splits=False
    )


def _check(x, matrix, targets, chunks) -> None:
    check_floating(x=x, matrix=matrix)
    check_array(targets=targets)
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise TypeError(f"targets are {targets.dtype}: give integers")
    if x.ndim != 3:
        raise ValueError(f"x has shape {x.shape}, expected [B, S, C]")
    if matrix.ndim != 2 or matrix.shape[0] != x.shape[-1]:
        raise ValueError(f"matrix has shape {matrix.shape}, expected ({x.shape[-1]}, V)")
    if targets.shape != x.shape[:-1]:
        raise ValueError(f"targets have shape {targets.shape}, expected {x.shape[:-1]}")
    if not isinstance(chunks, numbers.Integral) or chunks < 1:
        raise ValueError(f"chunks={chunks}: use an integer of at least 1")


def _as_int32(targets):
    """The same numbers, what lies beyond int32 at its ends: small dtypes wrap what they are compared with."""
    ends, mine = jnp.iinfo(jnp.int32), jnp.iinfo(targets.dtype)
    return jnp.clip(targets, max(mine.min, ends.min), min(mine.max, ends.max)).astype(jnp.int32)


@functools.partial(custom_vjp, nondiff_argnums=(0,))
def _loss(static, x, matrix, targets):
    return _per_device(*static, x, matrix, targets, gradients=False)[0]


def _loss_forward(static, x, matrix, targets):
    loss, dx, d_matrix = _per_device(*static, x, matrix, targets, gradients=True)
    # Split now like the parameter, since it is kept through the whole backward pass: 1.2 GiB for 27B's
    # whole matrix.
    d_matrix = sharding.split_parameters({"unembed": {"kernel": d_matrix}})["unembed"]["kernel"]
    return loss, (dx, d_matrix.astype(matrix.dtype))


def _loss_backward(static, gradients, cotangent):
    del static
    dx, d_matrix = ((cotangent * g.astype(cotangent.dtype)).astype(g.dtype) for g in gradients)
    return dx, d_matrix, np.zeros(dx.shape[:2], jax.dtypes.float0)


_loss.defvjp(_loss_forward, _loss_backward)


def _per_device(chunks, ignore_index, x, matrix, targets, *, gradients):
    """Returns the mean loss and, if asked for, its gradients of x and of the matrix."""
    run = functools.partial(
        _in_chunks, chunks=chunks, ignore_index=ignore_index, gradients=gradients
    )
    # In the dtype of the logits: its inverse is rounded.
    counted = jnp.maximum(num_counted(targets, ignore_index), 1).astype(wide_dtype(x.dtype))
    mesh, spec = sharding.token_spec(targets.shape)
    names = sharding.axis_names(spec)
    # The vocabulary stays split over the other axes.
    ours = {*sharding.BATCH_AXES, "sequence"} & {*sharding.free_sizes(mesh)}
    manual = frozenset(names) | ours | sharding.mapped_axes(mesh)
    if mesh is None or mesh.size == 1 or not manual:
        return run(x, matrix, targets, counted)

    def local(x, narrow, targets, counted):
        loss, *found = run(x, narrow, targets, counted)
        # Each device returns its part of a sum on an axis of its own, and XLA sums over that axis.
        return loss[None], *(part[None] if i else part for i, part in enumerate(found))

    by_device = PartitionSpec(names or None)
    inside = bool(varying_axes(x, matrix, targets))
    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(spec, PartitionSpec(), spec, PartitionSpec()),
        out_specs=(by_device, spec, by_device)[: 3 if gradients else 1],
        axis_names=manual,
        check_vma=inside,
    )
    args = x, matrix.astype(x.dtype), targets, counted  # in the dtype of x before it is gathered
    loss, *found = opaque(mapped, *args) if inside else mapped(*args)
    return loss.sum(), *(part.sum(0) if i else part for i, part in enumerate(found))


def _in_chunks(x, matrix, targets, counted, *, chunks, ignore_index, gradients):
    """Computes this device's part of `_per_device`: its tokens' share of a mean over `counted` tokens."""
    if targets.size % chunks:
        fit = [str(k) for k in range(1, min(chunks, targets.size)) if targets.size % k == 0]
        raise ValueError(
            f"model.loss_chunks={chunks} does not divide the {targets.size} tokens of a device: use "
            f"{', '.join(fit[-6:])} or a larger divisor"
        )
    narrow = matrix.astype(x.dtype)

    def body(totals, part):
        x, targets = part
        loss, *of_part = _chunk(x, narrow, targets, counted, ignore_index, gradients)
        totals = [total + found for total, found in zip(totals, [loss, *of_part[1:]])]
        return totals, of_part[:1]

    wide = wide_dtype(x.dtype)
    totals = [jnp.zeros((), wide)]
    if gradients:
        totals.append(jnp.zeros(matrix.shape, wide))
    varying = varying_axes(x, matrix, targets)
    totals = [as_varying(total, varying) for total in totals]
    parts = x.reshape(chunks, -1, x.shape[-1]), targets.reshape(chunks, -1)
    if chunks == 1:
        totals, dx = body(totals, [part[0] for part in parts])
    else:
        totals, dx = jax.lax.scan(body, totals, parts)
    loss, *d_matrix = totals
    return loss, *(d.reshape(x.shape) for d in dx), *d_matrix


def _chunk(x, matrix, targets, counted, ignore_index, gradients):
    """Returns, for x `[T, C]`, the sum of the losses over `counted` and its gradients of x and the matrix."""
    targets = targets[:, None]
    counts = targets != ignore_index
    # Here and not in the results alone: 0 times infinity would be NaN in the gradient of the matrix.
    x = jnp.where(counts, x, 0)
    logits = _unembed(x, matrix)
    shift = jnp.max(logits, axis=-1, keepdims=True)
    log_sum = jnp.log(jnp.sum(jnp.exp(logits - shift), axis=-1, keepdims=True)) + shift
    # A masked sum would be a pass of its own on GPUs. Where the vocabulary is split, XLA makes this a masked
    # choice and a sum.
    of_target = jnp.take_along_axis(logits, targets, axis=-1, mode="clip")
    valid = ~counts | ((targets >= 0) & (targets < logits.shape[-1]))
    # NaN is the result of an operation: a constant NaN would trip JAX_DEBUG_NANS although every target is
    # valid.
    divisor = counted * jnp.sqrt(jnp.where(valid, 1.0, -1.0))
    loss = jnp.sum(jnp.where(counts, (log_sum - of_target) / divisor, 0.0))
    if not gradients:
        return (loss,)
    is_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) == targets
    d_logits = (jnp.exp(logits - log_sum) - is_target.astype(logits.dtype)) * (1 / divisor)
    d_logits = jnp.where(counts, d_logits, 0.0)
    return loss, *_unembed_gradients(x, matrix, d_logits)
