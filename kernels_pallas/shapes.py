"""Checks of arguments, with the offending number in the message."""

import numbers

import jax
import jax.numpy as jnp

KERNEL_STREAMS = (2, 4, 8)
"""Numbers of streams of the kernels with Sinkhorn-Knopp inside; others take more: `check_unrolled_n`."""
STREAM_DTYPES = (jnp.bfloat16, jnp.float32, jnp.float64)


def check_width(streams: jax.Array, n: int, width: int) -> None:
    """Raises ValueError unless the streams are `[..., n*C]` with this n and this width C."""
    check_floating(streams=streams)
    found = streams.shape[-1] if streams.ndim else None
    if found != n * width:
        hint = f": widen [..., C] with mhc_jax.expand(x, n={n})" if found == width else ""
        raise ValueError(
            f"streams {streams.shape}: the last axis has to be n*C = {n} * {width} = {n * width}{hint}"
        )
    check_streams(streams, n)


def check_size(width: int, n: int) -> None:
    """Raises ValueError or TypeError unless width C and number of streams n are integers of at least 1."""
    for name, what, value in (
        ("n", "number of streams", n),
        ("width", "width C of a stream", width),
    ):
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            raise TypeError(f"{name}={value!r}: the {what} must be an integer")
        if value < 1:
            raise ValueError(f"{name}={value}: the {what} must be at least 1")


def check_array(**arrays) -> None:
    """Raises TypeError for what is not an array (None, a list, a number), by the name that the user knows."""
    for name, x in arrays.items():
        if x is None:
            raise TypeError(f"{name} is None, not an array")
        if not hasattr(x, "dtype"):
            raise TypeError(
                f"{name} is a {type(x).__name__}, not an array: use jnp.asarray({name})"
            )


def check_floating(**arrays) -> None:
    """Checks arguments by the names that the user knows.

    Raises:
      TypeError: not an array (None, a list, a number), or integers, booleans, complex numbers.
    """
    check_array(**arrays)
    for name, x in arrays.items():
        if not jnp.issubdtype(x.dtype, jnp.floating):
            part = ".real" if jnp.issubdtype(x.dtype, jnp.complexfloating) else ""
            raise TypeError(
                f"{name} is {x.dtype}: use a floating dtype, {name}{part}.astype(jnp.float32)"
            )


def check_streams(streams: jax.Array, n: int) -> int:
    """Returns the width C of one stream of flat `streams` [..., n*C].

    Raises:
      ValueError: n < 1 or the last axis is not a multiple of n.
      TypeError: n is no integer; not an array, or a dtype other than bfloat16, float32 (float64 under
        jax_enable_x64).
    """
    check_floating(streams=streams)
    check_size(1, n)
    if streams.ndim < 1 or streams.shape[-1] % n or not streams.shape[-1]:
        raise ValueError(f"streams {streams.shape}: the last axis must be n*C, a multiple of n={n}")
    if streams.dtype not in STREAM_DTYPES:
        raise TypeError(
            f"streams are {streams.dtype}: use bfloat16 or float32, streams.astype(...)"
        )
    return streams.shape[-1] // n


def check_layer_output(streams: jax.Array, layer_output: jax.Array, width: int) -> None:
    """Checks what a sublayer's F returned against the streams `[..., n*C]` that it is written to.

    Raises:
      TypeError: not one array, or not of the dtype of the streams.
      ValueError: not of the shape `[..., C]`.
    """
    if isinstance(layer_output, (list, tuple, dict)):
        raise TypeError(
            f"layer_output is a {type(layer_output).__name__}: a layer has to return one array [..., C]; "
            "for more results call `pre`, the layer and `post` one after the other"
        )
    check_floating(layer_output=layer_output)
    expected = (*streams.shape[:-1], width)
    if layer_output.shape != expected:
        raise ValueError(
            f"layer_output has shape {layer_output.shape}, expected {expected}: the streams are "
            f"{streams.shape}, n = {streams.shape[-1] // width} of width C = {width}"
        )
    if layer_output.dtype != streams.dtype:
        raise TypeError(
            f"layer_output is {layer_output.dtype}, the streams are {streams.dtype}: use "
            "layer_output.astype(streams.dtype)"
        )


def check_update(
    streams: jax.Array, layer_output: jax.Array, h_post: jax.Array, h_res: jax.Array, n: int
) -> None:
    """Checks what is written to streams `[..., n*C]`; raises as `check_layer_output` and `check_shape`."""
    lead, width = streams.shape[:-1], streams.shape[-1] // n
    check_floating(h_post=h_post, h_res=h_res)
    check_layer_output(streams, layer_output, width)
    check_shape("h_post", h_post, (*lead, n))
    check_shape("h_res", h_res, (*lead, n, n))


def check_phi(streams: jax.Array, phi: jax.Array, num_columns: int | None = None) -> None:
    """Raises ValueError unless `phi` has a row for each entry of a token, and `num_columns` columns."""
    if phi.ndim != 2 or num_columns not in (None, phi.shape[1]):
        columns = "m" if num_columns is None else num_columns
        raise ValueError(f"phi has shape {phi.shape}, expected ({streams.shape[-1]}, {columns})")
    if phi.shape[0] != streams.shape[-1]:
        raise ValueError(
            f"streams {streams.shape} and phi {phi.shape} do not fit: the last axis of the streams is n*C, "
            "all streams of a token, and phi has as many rows"
        )


def check_kernel_n(n: int) -> None:
    """Raises NotImplementedError for a number of streams that no kernel takes."""
    if n not in KERNEL_STREAMS:
        raise NotImplementedError(f"n={n}: the kernels take n = 2, 4 or 8")


def check_unrolled_n(n: int, least: int = 1) -> None:
    """Raises NotImplementedError for more or fewer streams than kernels take that repeat code n times."""
    if not least <= n <= 8:
        raise NotImplementedError(f"n={n}: the kernels take n from {least} to 8")


def check_kernel_dtype(dtype) -> None:
    """Raises NotImplementedError for streams that no kernel takes: float64."""
    if dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"{dtype} streams: the kernels take bfloat16 or float32")


def check_shape(name: str, x: jax.Array, expected: tuple[int, ...]) -> None:
    """Raises ValueError unless `x.shape == expected`."""
    if x.shape != expected:
        raise ValueError(f"{name} has shape {x.shape}, expected {expected}")


def num_streams(name: str, mapping: jax.Array, streams: jax.Array) -> int:
    """n, the last axis of a read or write mapping `[..., n]` of streams `[..., n*C]`.

    Raises:
      ValueError: no axis, or one that does not divide that of the streams.
    """
    if not mapping.ndim:
        raise ValueError(f"{name} has shape (), expected [..., n]")
    n = mapping.shape[-1]
    if n < 1 or (streams.shape[-1:] and streams.shape[-1] % n):
        raise ValueError(
            f"{name} has shape {mapping.shape}, so n = {n}: the last axis n*C of streams {streams.shape} is "
            "no multiple of it"
        )
    return n


def num_columns(n: int) -> int:
    """Columns of phi and entries of bias: pre (n), post (n), res (n*n)."""
    return n * n + 2 * n
