"""Weights of connections to and from other implementations of mHC.

    from flax import nnx
    from mhc_jax import ManifoldHyperConnections, interop

    hc = model.model.layers[0].attn_hc  # of `transformers`' DeepSeek-V4, n = 4, C = 4096
    connection = ManifoldHyperConnections(4096, n=4, **interop.DEEPSEEK_V4)
    nnx.update(connection, interop.from_deepseek_v4(hc.fn, hc.base, hc.scale))

Only layouts change: the other implementations keep phi transposed or h_res transposed, and alpha in three
pieces. `DEEPSEEK_V4`, `MEGATRON`, `MEGATRON_UNTRANSPOSED` and `LIGER` are their conventions
(`kernels_pallas.conventions`) at their default eps, as options of `ManifoldHyperConnections`. phi is rounded
to TF32 in use, which the others do not do; `phi_precision="highest"` leaves it as it is, for float32 streams.

Every function takes NumPy, JAX or PyTorch arrays of any floating dtype and returns NumPy arrays: float64 for
float64, else float32. n and C follow from the shapes.
"""

import math
from typing import Any

import numpy as np

from mhc_jax.manifolds import Birkhoff

DEEPSEEK_V4 = {"manifold": Birkhoff(eps=1e-6), "pre_eps": 1e-6, "norm_eps": 1e-6}
"""Its head is `Readout("head", C, n, eps=1e-6, norm_eps=1e-6)`."""

MEGATRON = {"manifold": Birkhoff(eps=1e-6), "pre_eps": 1e-6}
"""Megatron-Core since May 2026. It divides by ||x|| / sqrt(nC) + 1e-6, which no `norm_eps` equals: logits
differ by 1e-6 of their dynamic part where the streams have size 1. Its learned output contraction has the
layout of DeepSeek-V4's head."""

MEGATRON_UNTRANSPOSED = {"manifold": Birkhoff(eps=1e-6, last="columns"), "pre_eps": 1e-6}
"""Megatron-Core before May 2026, which applied h_res where it now applies its transpose."""

LIGER = {"manifold": Birkhoff(eps=1e-6, last="columns"), "norm_eps": 1e-6}
"""Liger-Kernel."""


def from_deepseek_v4(fn: Any, base: Any, scale: Any) -> dict[str, np.ndarray]:
    """`attn_hc`, `ffn_hc` or `hc_head` of DeepSeek-V4 as parameters of a connection or a head.

        nnx.update(connection, from_deepseek_v4(hc.fn, hc.base, hc.scale))
        nnx.update(readout, from_deepseek_v4(head.hc_fn, head.hc_base, head.hc_scale))

    Args:
      fn: `[n*n+2n, n*C]`, rows pre (n), post (n), comb (n*n); of a head `[n, n*C]`.
      base: `[n*n+2n]`, same order; of a head `[n]`.
      scale: `[3]` of pre, post, comb; of a head `[1]`.

    Returns:
      phi `[n*C, n*n+2n]`, bias `[n*n+2n]`, alpha `[3]`; of a head `[n*C, n]`, `[n]`, `[1]`. comb is applied
      transposed there: its (i, j) is our h_res (j, i).

    Raises:
      ValueError: shapes that do not fit each other.
      TypeError: no floating dtype.
    """
    fn, base, scale = _array("fn", fn), _array("base", base), _array("scale", scale)
    n = _num_streams("fn", fn.T, "base", base, "scale", scale, transposed=True)
    return {"phi": _turn(fn.T, n), "bias": _turn(base, n), "alpha": scale}


def to_deepseek_v4(phi: Any, bias: Any, alpha: Any) -> dict[str, np.ndarray]:
    """Parameters of a connection, or of a head, as `fn`, `base` and `scale` of DeepSeek-V4.

        to_deepseek_v4(connection.phi[...], connection.bias[...], connection.alpha[...])["fn"]

    Args, Returns, Raises: as in `from_deepseek_v4`, the other way round; float32 (float64 of float64).
    """
    phi, bias, alpha = _ours(phi, bias, alpha)
    n = _num_streams("phi", phi, "bias", bias, "alpha", alpha)
    return {"fn": _turn(phi, n).T.copy(), "base": _turn(bias, n), "scale": alpha}


def from_megatron(
    weight: Any,
    bias: Any,
    alpha_pre: Any,
    alpha_post: Any,
    alpha_res: Any,
    *,
    transposed: bool = True,
) -> dict[str, np.ndarray]:
    """Megatron-Core's `HyperConnectionModule` as parameters of a connection.

        hc = layer.self_attention_hyper_connection
        alphas = hc.alpha_pre, hc.alpha_post, hc.alpha_res
        nnx.update(connection, from_megatron(hc.mapping_proj.weight, hc.bias, *alphas))

    Args:
      weight: `[n*n+2n, n*C]`, of `mapping_proj`, rows pre (n), post (n), res (n*n).
      bias: `[n*n+2n]`, same order.
      alpha_pre, alpha_post, alpha_res: `[1]` or `[]`.
      transposed: whether the weights were trained with `H_res^T x` (since May 2026, options `MEGATRON`) or
        with `H_res x` (before, options `MEGATRON_UNTRANSPOSED`). Nothing in a checkpoint tells.

    Returns:
      phi `[n*C, n*n+2n]`, bias `[n*n+2n]`, alpha `[3]`.

    Raises:
      ValueError: shapes that do not fit each other.
      TypeError: no floating dtype.
    """
    weight, bias = _array("weight", weight), _array("bias", bias)
    alpha = _joined(alpha_pre, alpha_post, alpha_res)
    n = _num_streams("weight", weight.T, "bias", bias, "alpha", alpha, transposed=True)
    if transposed:
        return {"phi": _turn(weight.T, n), "bias": _turn(bias, n), "alpha": alpha}
    return {"phi": weight.T.copy(), "bias": bias, "alpha": alpha}


def to_megatron(phi: Any, bias: Any, alpha: Any, *, transposed: bool = True) -> dict:
    """Parameters of a connection by the names of Megatron-Core's `HyperConnectionModule`.

        state = to_megatron(connection.phi[...], connection.bias[...], connection.alpha[...])
        module.load_state_dict({name: torch.from_numpy(x) for name, x in state.items()})

    Returns:
      `mapping_proj.weight` `[n*n+2n, n*C]`, `bias` `[n*n+2n]`, `alpha_pre`, `alpha_post`, `alpha_res` `[1]`;
      float32 (float64 of float64).

    Args, Raises: as in `from_megatron`, the other way round.
    """
    phi, bias, alpha = _ours(phi, bias, alpha)
    n = _num_streams("phi", phi, "bias", bias, "alpha", alpha, head=False)
    if transposed:
        phi, bias = _turn(phi, n), _turn(bias, n)
    gates = {name: alpha[k : k + 1] for k, name in enumerate(_ALPHAS)}
    return {"mapping_proj.weight": phi.T.copy(), "bias": bias, **gates}


def from_liger(
    phi: Any, b: Any, alpha_pre: Any, alpha_post: Any, alpha_res: Any
) -> dict[str, np.ndarray]:
    """Liger-Kernel's `LigerMHC` as parameters of a connection (options `LIGER`).

        nnx.update(connection, from_liger(m.phi, m.b, m.alpha_pre, m.alpha_post, m.alpha_res))

    Args:
      phi: `[n*C, n*n+2n]`, as ours.
      b: `[n*n+2n]`, as our bias.
      alpha_pre, alpha_post, alpha_res: `[]` or `[1]`.

    Returns:
      phi `[n*C, n*n+2n]`, bias `[n*n+2n]`, alpha `[3]`.

    Raises:
      ValueError: shapes that do not fit each other.
      TypeError: no floating dtype.
    """
    phi, b = _array("phi", phi), _array("b", b)
    alpha = _joined(alpha_pre, alpha_post, alpha_res)
    _num_streams("phi", phi, "b", b, "alpha", alpha)
    return {"phi": phi, "bias": b, "alpha": alpha}


def to_liger(phi: Any, bias: Any, alpha: Any) -> dict[str, np.ndarray]:
    """Parameters of a connection by the names of Liger-Kernel's `LigerMHC`.

        state = to_liger(connection.phi[...], connection.bias[...], connection.alpha[...])
        module.load_state_dict({name: torch.from_numpy(x) for name, x in state.items()}, strict=False)

    Returns:
      `phi` `[n*C, n*n+2n]`, `b` `[n*n+2n]`, and `alpha_pre`, `alpha_post`, `alpha_res` `[]`; float32 (float64
      of float64).

    Args, Raises: as in `from_liger`, the other way round.
    """
    phi, bias, alpha = _ours(phi, bias, alpha)
    _num_streams("phi", phi, "bias", bias, "alpha", alpha, head=False)
    return {"phi": phi, "b": bias} | {name: alpha[k, ...] for k, name in enumerate(_ALPHAS)}


_ALPHAS = ("alpha_pre", "alpha_post", "alpha_res")


def _ours(phi, bias, alpha):
    return _array("phi", phi), _array("bias", bias), _array("alpha", alpha)


def _array(name: str, x: Any) -> np.ndarray:
    """A copy on the host: float64 for float64, else float32, which holds bfloat16 and float16 exactly."""
    if hasattr(x, "detach"):  # PyTorch, whose bfloat16 NumPy does not know
        x = x.detach().cpu()
        x = x.float() if str(x.dtype) in ("torch.bfloat16", "torch.float16") else x
    x = np.asarray(x)
    if x.dtype.kind in "iubcOSU":
        raise TypeError(f"{name} is {x.dtype}: weights are floating-point numbers")
    return x.astype(np.float64 if x.dtype == np.float64 else np.float32)


def _joined(*alphas: Any) -> np.ndarray:
    found = [_array(name, alpha) for name, alpha in zip(_ALPHAS, alphas, strict=True)]
    for name, alpha in zip(_ALPHAS, found):
        if alpha.size != 1:
            raise ValueError(f"{name} has shape {alpha.shape}: it must be one number")
    return np.concatenate([alpha.reshape(1) for alpha in found])


def _num_streams(name, phi, bias_name, bias, alpha_name, alpha, *, transposed=False, head=True):
    """n, from a phi `[n*C, m]`, its bias `[m]` and alpha; `transposed`: how `name` is shaped for its user."""
    shape = phi.shape[::-1] if transposed else phi.shape
    if phi.ndim != 2 or bias.shape != phi.shape[1:]:
        of = "rows" if transposed else "columns"
        raise ValueError(
            f"{name} {shape} and {bias_name} {bias.shape} do not fit: {bias_name} has an entry for each of "
            f"the {of} of {name}"
        )
    m, is_head = phi.shape[1], head and alpha.shape == (1,)
    if not is_head and alpha.shape != (3,):
        heads = ", of a head [1]" if head else ""
        raise ValueError(
            f"{alpha_name} has shape {alpha.shape}: it must be [3] (pre, post, res){heads}"
        )
    n = m if is_head else math.isqrt(m + 1) - 1
    if not n or (not is_head and n * n + 2 * n != m):
        raise ValueError(
            f"{name} {shape}: {m} is no n*n + 2n (3, 8, 15, 24, ...), the number of logits of n streams"
        )
    if not phi.shape[0] or phi.shape[0] % n:
        raise ValueError(
            f"{name} {shape}: {phi.shape[0]} is no n*C, a multiple of the n = {n} streams that {bias_name} "
            f"{bias.shape} says"
        )
    return n


def _turn(x: np.ndarray, n: int) -> np.ndarray:
    """Transposes the residual part of `[..., n*n+2n]`: column (i, j) becomes (j, i); a head has none."""
    gates, res = x[..., : 2 * n], x[..., 2 * n :]
    if not res.shape[-1]:
        return x.copy()
    res = res.reshape(*x.shape[:-1], n, n).swapaxes(-1, -2).reshape(res.shape)
    return np.concatenate([gates, res], axis=-1)


__all__ = [
    "DEEPSEEK_V4",
    "LIGER",
    "MEGATRON",
    "MEGATRON_UNTRANSPOSED",
    "from_deepseek_v4",
    "from_liger",
    "from_megatron",
    "to_deepseek_v4",
    "to_liger",
    "to_megatron",
]
