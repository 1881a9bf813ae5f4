"""Computes gains of the static part of the mappings, from parameters alone."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mhc_jax.connections import HyperConnections, ManifoldHyperConnections, Residual
from mhc_jax.gains import GainMagnitudes, gain_magnitudes
from mhc_jax.manifolds import Birkhoff, Identity, Manifold


class _Static(NamedTuple):
    """The static h_res `[..., n, n]` of a connection; leading axes count stacked blocks."""

    h_res: np.ndarray


def static_gains(
    parameters: Any, *, n: int | None = None, manifold: Manifold | None = None
) -> GainMagnitudes:
    """Computes gain magnitudes of the static mappings: h_res where the dynamic part is zero.

    That is the projection of `bias`, the same for every token. It needs no text and no forward pass, so it
    works for a model of any size. It does not show what the mappings do with a token.

        static_gains(model)  # an NNX model
        static_gains(variables["params"])  # nested dicts, of Linen or of a checkpoint
        static_gains([{"phi": phi, "bias": bias, "alpha": alpha}, ...])  # one dict a sublayer

    Args:
      parameters: an NNX model, nested dicts of parameters, or a sequence of either. A connection's are
        `phi`, `bias`, `alpha` (mHC) or `theta`, `bias`, `alpha` (HC). A sequence is in order of execution.
        Modules and dicts are ordered by name, with numbers as numbers. Blocks stacked along a first axis,
        `[N, ...]`, count one after the other.
      n: number of streams, for parameters in dicts; None: the one with n*n + 2n logits.
      manifold: of mHC's mappings, for parameters in dicts; None: `Identity()` if there are no more than 2n
        logits, else `Birkhoff()`.

    Returns:
      GainMagnitudes of L sublayers and one token; ones for residual connections.

    Raises:
      ValueError: no parameters of connections, or shapes that no connection has.
    """
    return gain_magnitudes(_mappings(parameters, n, manifold))


def _mappings(
    parameters: Any, n: int | None = None, manifold: Manifold | None = None
) -> np.ndarray:
    """Returns h_res [L, n, n]; see `static_gains`."""
    tree = _tree(parameters, n, manifold, set())
    if tree is None:
        raise ValueError(
            "static_gains takes an NNX model, nested dicts of parameters or a sequence of them, got "
            f"{type(parameters).__name__}"
        )
    mappings = _in_order(tree)
    if not mappings:
        raise ValueError(
            "there are no parameters of connections here: bias and alpha with phi (mHC) or theta (HC)"
        )
    shapes = {h_res.shape for h_res in mappings}
    if len(shapes) > 1:
        raise ValueError(f"the connections have different numbers of streams: {sorted(shapes)}")
    return np.stack(mappings)


def _tree(node: Any, n: int | None, manifold: Manifold | None, seen: set[int]) -> Any:
    """Returns ordered nested dicts, with `_Static` for a connection and a shape for any other array."""
    if isinstance(node, nnx.Variable):
        return np.shape(node.get_value())
    if isinstance(node, nnx.Module | list | tuple | dict) and not isinstance(node, Mapping):
        if id(node) in seen:  # a module that two others hold
            return {}
        seen.add(id(node))
    if isinstance(node, Residual | HyperConnections | ManifoldHyperConnections):
        return _of_module(node)
    if isinstance(node, nnx.Module):
        children = enumerate(node) if isinstance(node, nnx.List) else _sorted(vars(node))
    elif isinstance(node, Mapping):
        if {"bias", "alpha"} <= set(node) and set(node) & {"phi", "theta"}:
            return _of_parameters(node, n, manifold)
        children = _sorted(node)
    elif isinstance(node, Sequence) and not isinstance(node, str | bytes):
        children = enumerate(node)
    else:
        return np.shape(node) if hasattr(node, "__array__") else None
    found = {str(key): _tree(child, n, manifold, seen) for key, child in children}
    return {key: child for key, child in found.items() if child is not None}


def _of_module(connection: nnx.Module) -> _Static:
    if isinstance(connection, Residual):
        return _Static(np.ones((1, 1), np.float32))
    n, bias = connection.n, _array(connection.bias)
    if isinstance(connection, ManifoldHyperConnections):
        return _Static(np.asarray(connection.manifold.project(jnp.asarray(bias[..., 2 * n :]), n)))
    h_res = bias[..., 2 * n :].reshape(*bias.shape[:-1], n, n)
    return _Static(
        h_res if connection.use_res else np.zeros_like(h_res) + np.eye(n, dtype=h_res.dtype)
    )


def _of_parameters(found: Mapping, n: int | None, manifold: Manifold | None) -> _Static | None:
    bias, alpha = _array(found["bias"]), _array(found["alpha"])
    if alpha.shape[-1:] == (1,):  # the head of a read-out
        return None
    m = bias.shape[-1] if bias.ndim else 0
    streams = math.isqrt(m + 1) - 1 if n is None else n
    logits = bias[..., 2 * streams :]
    if n is None and (m < 3 or streams * (streams + 2) != m):
        raise ValueError(
            f"bias of shape {bias.shape} is not that of n*n + 2n logits: give n, the number of streams, and "
            "manifold, if it is neither Birkhoff() nor Identity()"
        )
    if "theta" in found:
        manifold = None
    elif manifold is None:
        manifold = Birkhoff() if logits.shape[-1] else Identity()
    wanted = streams * streams if manifold is None else manifold.num_logits(streams)
    if logits.shape[-1] != wanted or m < 2 * streams:
        raise ValueError(
            f"bias of shape {bias.shape} does not fit n={streams}: its last axis must be 2n + {wanted}"
            + (f" with {manifold}: give another n or manifold" if manifold else "")
        )
    if manifold is None:
        return _Static(logits.reshape(*bias.shape[:-1], streams, streams))
    return _Static(np.asarray(manifold.project(jnp.asarray(logits), streams)))


def _array(x: Any) -> np.ndarray:
    """Returns a parameter of NNX, Linen (boxed or not) or PyTorch as float32 on the host."""
    if isinstance(x, nnx.Variable):
        x = x.get_value()
    if hasattr(x, "unbox"):
        x = x.unbox()
    if hasattr(x, "detach"):
        x = x.detach().float().cpu()
    return np.asarray(x).astype(np.float32)


def _sorted(node: Mapping) -> list[tuple[Any, Any]]:
    """Sorts by name, numbers in it as numbers; the leading blocks of our decoder come first.

    The order of definition is unknown: modules and dicts that went through JAX are sorted.
    """

    def key(item):
        name = str(item[0])
        parts = [
            (0, int(p), "") if p.isdigit() else (1, 0, p) for p in re.split(r"(\d+)", name) if p
        ]
        return name != "leading", parts

    return sorted(node.items(), key=key)


def _in_order(tree: dict) -> list[np.ndarray]:
    """Yields h_res [n, n] of every sublayer; of stacked blocks, all of one block and then all of the next."""
    if isinstance(tree, _Static):
        return list(tree.h_res.reshape(-1, *tree.h_res.shape[-2:]))
    if not isinstance(tree, dict):
        return []
    blocks = _stacked(tree)
    if blocks is None:
        return [h_res for child in tree.values() for h_res in _in_order(child)]
    per_connection = [
        np.broadcast_to(h_res, (blocks, *h_res.shape[-2:])) for h_res in _connections(tree)
    ]
    return [h_res[block] for block in range(blocks) for h_res in per_connection]


def _connections(tree: Any) -> list[np.ndarray]:
    if isinstance(tree, _Static):
        return [tree.h_res]
    children = tree.values() if isinstance(tree, dict) else ()
    return [h_res for child in children for h_res in _connections(child)]


def _shapes(tree: Any) -> list[tuple[int, ...]]:
    """Yields the shapes of all arrays except the connections'."""
    if isinstance(tree, dict):
        return [shape for child in tree.values() for shape in _shapes(child)]
    return [] if isinstance(tree, _Static) else [tree]


def _stacked(tree: dict) -> int | None:
    """Returns N if all its arrays are stacked along a first axis of N."""
    found = _connections(tree)
    learned = [h_res for h_res in found if h_res.shape[-1] > 1 or h_res.ndim > 2]
    others = _shapes(tree)
    firsts = {h_res.shape[0] if h_res.ndim == 3 else None for h_res in learned}
    firsts |= {shape[0] if shape else None for shape in others}
    # Residual connections have no parameters, so only those of their blocks tell, and a vector is never
    # stacked.
    alone = not learned and (not others or min(map(len, others)) < 2)
    return firsts.pop() if found and not alone and len(firsts) == 1 and None not in firsts else None
