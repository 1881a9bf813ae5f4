"""Collects the mappings of all sublayers from a model that keeps none of them.

Connections call `report` with every h_res. It does nothing and does not change the compiled program, unless
somebody collects:

- `flax.nnx.capture(model, nnx.Intermediate)` finds each h_res as an `nnx.Intermediate`;
- `linen_model.apply(variables, x, mutable=["intermediates"])` finds them under "intermediates", for
  connections in `nnx.bridge.ToLinen`;
- `collected` finds them all, in the order of execution and whatever lies between model and connection: it
  reads the traced program, where they are in a primitive of their own. A loop that was traced once reports
  each of its steps.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Primitive
from jax.interpreters import batching, mlir

from mhc_jax.gains import stream_cosine

# It is part of the key of every trace cache: a function that was traced while nobody collected is traced
# again.
_collecting = jax.make_user_context(False)

_NAME = "h_res"
_report_p = Primitive("mhc_report")
_report_p.def_abstract_eval(lambda h_res, streams, **_: h_res)
_report_p.def_impl(lambda h_res, streams, **_: h_res)
mlir.register_lowering(_report_p, lambda ctx, h_res, streams, **_: [h_res])


def _batch(args, dims, *, batch_axes):
    """Puts axes of vmap first, whether or not h_res depends on them."""
    size = next(x.shape[d] for x, d in zip(args, dims) if d is not None)
    args = (
        jnp.broadcast_to(x, (size, *x.shape)) if d is None else jnp.moveaxis(x, d, 0)
        for x, d in zip(args, dims)
    )
    return _report_p.bind(*args, batch_axes=batch_axes + 1), 0


batching.primitive_batchers[_report_p] = _batch


def _linen_collects() -> bool:
    """Returns whether a `ToLinen` around the present module may store intermediates."""
    find = getattr(nnx.bridge.wrappers, "current_linen_module", lambda: None)
    module = find()
    inside = isinstance(module, nnx.bridge.ToLinen)
    return inside and module.is_mutable_collection("intermediates")


def expect(connection: nnx.Module) -> None:
    """Makes the variable in which `report` stores under Linen, which makes a module anew for every call."""
    if _linen_collects():
        connection.h_res = nnx.Intermediate(())


def report(connection: nnx.Module, h_res: jax.Array | None, streams: jax.Array) -> jax.Array | None:
    """Returns h_res unchanged, and lets it be collected; see the module's docstring.

    Args:
      connection: the connection that reports.
      h_res: `[..., n, n]` float32; None: of the residual connection, ones `[..., 1, 1]`.
      streams: `[..., n*C]` of the activations' dtype, what the sublayer reads.
    """
    captured, stored = hasattr(connection, "__captures__"), vars(connection).get(_NAME)
    if not (captured or stored is not None or _collecting.value):
        return h_res
    shown = jnp.ones((*streams.shape[:-1], 1, 1), jnp.float32) if h_res is None else h_res
    if captured:  # inside of nnx.capture
        connection.sow(nnx.Intermediate, _NAME, shown)
    elif stored is not None:
        stored.set_value((*stored.get_value(), shown))
    if _collecting.value:
        shown = _report_p.bind(shown, streams, batch_axes=0)
    return h_res if h_res is None else shown


class Collected(NamedTuple):
    """The reports of a model's connections, L sublayers in order of execution.

    Attributes:
      h_res: `[L, ..., n, n]` float32, axes of vmap before those of the tokens.
      stream_cosine: `[L]` float32, see `mhc_jax.gains.stream_cosine`.
    """

    h_res: jax.Array
    stream_cosine: jax.Array


def collected(function: Callable) -> Callable[..., Collected]:
    """Returns a function of the same arguments that returns what connections inside `function` report.

    Raises (when called):
      ValueError: no connection reported, or they have different numbers of streams or tokens; a module that
        `function` takes from outside, under a transform of Flax.
      NotImplementedError: a connection in a loop of unknown length, in one branch alone, or in shard_map.
    """

    def run(*args, **kwargs):
        flat, tree = jax.tree.flatten((args, kwargs))

        def call(*flat):
            args, kwargs = jax.tree.unflatten(tree, flat)
            function(*args, **kwargs)

        try:
            with _collecting(True):
                traced = jax.make_jaxpr(call)(*flat)
        except Exception as error:  # Flax has two: TraceContextError and ValueError
            if "trace level" not in str(error):
                raise
            raise ValueError(
                "a transform of Flax inside refuses a module that comes from outside of the function: give "
                "the module itself, gains_of(model, inputs)"
            ) from error
        if not _reports(traced.jaxpr):
            raise ValueError(
                "no connection of mhc_jax ran in this model: put HyperConnections, ManifoldHyperConnections "
                "or Residual around its sublayers, and call it on inputs that reach them. Mappings of other "
                "code go to gain_magnitudes, [sublayers, tokens, n, n]"
            )
        found = _run(traced.jaxpr, traced.consts, flat)[1]
        shapes = {h_res.shape[1:] for h_res, _ in found}
        if len(shapes) > 1:
            raise ValueError(
                f"the connections have h_res of different shapes, {sorted(shapes)}: gains over depth need "
                "the same tokens and streams in every sublayer"
            )
        return Collected(*(jnp.concatenate(parts) for parts in zip(*found)))

    return run


def _inner(eqn) -> list[Jaxpr]:
    """Returns the programs inside an equation."""
    values = jax.tree.leaves(
        list(eqn.params.values()), is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)
    )
    closed = [v.jaxpr if isinstance(v, ClosedJaxpr) else v for v in values]
    return [v for v in closed if isinstance(v, Jaxpr)]


def _reports(jaxpr: Jaxpr) -> bool:
    return any(eqn.primitive is _report_p or any(map(_reports, _inner(eqn))) for eqn in jaxpr.eqns)


def _run(jaxpr: Jaxpr, consts, args) -> tuple[list, list]:
    """Evaluates a program; returns its outputs and its reports (h_res [k, ..., n, n], cosine [k])."""
    values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args]))
    found: list[tuple[jax.Array, jax.Array]] = []

    def read(x):
        return x.val if isinstance(x, Literal) else values[x]

    for eqn in jaxpr.eqns:
        inputs = [read(x) for x in eqn.invars]
        if eqn.primitive is _report_p:
            h_res, streams = inputs
            outputs = [h_res]
            cosine = stream_cosine(streams, h_res.shape[-1])
            found.append((h_res.astype(jnp.float32)[None], cosine[None]))
        elif any(map(_reports, _inner(eqn))):
            outputs, inside = _run_nested(eqn, inputs)
            found += inside
        else:
            parameters = eqn.primitive.get_bind_params(eqn.params)
            outputs = eqn.primitive.bind(*inputs, **parameters)
            outputs = outputs if eqn.primitive.multiple_results else [outputs]
        values.update(zip(eqn.outvars, outputs))
    return [read(x) for x in jaxpr.outvars], found


def _run_nested(eqn, inputs) -> tuple[list, list]:
    """Does the same for an equation with a program inside that reports."""
    name = eqn.primitive.name
    if name == "scan":
        return _run_scan(eqn, inputs)
    if name == "cond":
        return _run_branches(eqn.params["branches"], inputs)
    if name in ("while", "shard_map"):
        where = "a loop of unknown length (lax.while_loop)" if name == "while" else "shard_map"
        raise NotImplementedError(
            f"a connection inside of {where} cannot be collected: use lax.scan or nnx.scan, on one device"
        )
    # jit, remat, custom derivatives and the like run their program once.
    (jaxpr,) = (x for x in _inner(eqn) if _reports(x))
    closed = [
        x for x in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_closed) if _is_closed(x)
    ]
    consts = next((x.consts for x in closed if x.jaxpr is jaxpr), ())
    if len(jaxpr.invars) != len(inputs):
        raise NotImplementedError(f"a connection inside of {name} cannot be collected")
    return _run(jaxpr, consts, inputs)


def _is_closed(x) -> bool:
    return isinstance(x, ClosedJaxpr)


def _run_scan(eqn, inputs) -> tuple[list, list]:
    jaxpr, reverse = eqn.params["jaxpr"], eqn.params["reverse"]
    length, unroll = eqn.params["length"], eqn.params["unroll"]

    def stacked(outside, inside):  # jax versions differ in the name of this parameter
        return sum(a.aval.ndim > b.aval.ndim for a, b in zip(outside, inside))

    num_carry = len(eqn.outvars) - stacked(eqn.outvars, jaxpr.jaxpr.outvars)
    num_xs = stacked(eqn.invars, jaxpr.jaxpr.invars)
    num_consts = len(inputs) - num_carry - num_xs
    consts, carry = inputs[:num_consts], inputs[num_consts : len(inputs) - num_xs]
    xs = inputs[len(inputs) - num_xs :]

    def step(carry, xs):
        outputs, found = _run(jaxpr.jaxpr, jaxpr.consts, [*consts, *carry, *xs])
        return outputs[:num_carry], (outputs[num_carry:], found)

    carry, (ys, found) = jax.lax.scan(step, carry, xs, length, reverse=reverse, unroll=unroll)
    shapes = {h_res.shape[2:] for h_res, _ in found}
    if len(shapes) > 1:
        raise ValueError(
            f"the connections of a scan have h_res of different shapes, {sorted(shapes)}"
        )
    # From [length, k, ...] of each report of the body to one sequence, step after step.
    h_res, cosine = (jnp.concatenate(parts, axis=1) for parts in zip(*found))
    if reverse:
        h_res, cosine = h_res[::-1], cosine[::-1]
    rows = h_res.shape[0] * h_res.shape[1]  # not -1, which an array without tokens does not tell
    return [*carry, *ys], [(h_res.reshape(rows, *h_res.shape[2:]), cosine.reshape(rows))]


def _run_branches(branches, inputs) -> tuple[list, list]:
    index, *operands = inputs

    def run(branch):
        return lambda *operands: _run(branch.jaxpr, branch.consts, operands)

    try:
        return jax.lax.switch(index, [run(branch) for branch in branches], *operands)
    except TypeError as error:
        raise NotImplementedError(
            "a connection in one branch of lax.cond or lax.switch alone cannot be collected: every branch "
            "must have the same number of them"
        ) from error
