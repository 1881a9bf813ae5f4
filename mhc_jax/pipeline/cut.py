"""A program of JAX in two parts, so that little waits between them.

A stage is cut three times: into forward and backward (`residuals`), into what a backward computes again and
the rest of it (`residuals`), into gradients of matrices and all others (`split_backward`). Each time the
later part reads values that the earlier one has made, and these wait in memory until it runs. So a value that
is cheap to make from smaller ones is not kept: the later part makes it again.
"""

import collections
import itertools
import math
from collections.abc import Collection, Container

import jax
import jax.extend.core

from kernels_pallas.derivatives import ALIKE

# What these call is written out, so that a cut can go through it.
CALLS = ("jit", "pjit", "closed_call", "remat2", "custom_jvp_call", "custom_vjp_call")
_PRODUCTS = {"dot_general", "ragged_dot_general", "pallas_call"}
# To run these again costs less than to keep their results: a compiler fuses them into what reads them.
_CHEAP = {
    "abs", "add", "add_any", "and", "broadcast_in_dim", "concatenate", "convert_element_type", "copy",
    "div", "eq", "erf", "exp", "gather", "ge", "gt", "integer_pow", "le", "logistic", "lt", "max", "min",
    "mul", "name", "ne", "neg", "not", "or", "pad", "reshape", "rev", "rsqrt", "select_n", "sign",
    "slice", "split", "sqrt", "square", "squeeze", "stop_gradient", "sub", "tanh", "transpose",
}  # fmt: skip


def is_cheap(eqn) -> bool:
    """Whether to run an operation again costs less than to keep its result."""
    return eqn.primitive.name in _CHEAP


def has_product(eqn) -> bool:
    """Whether an operation is a product, or a loop or a choice with one in it."""
    return eqn.primitive.name in _PRODUCTS or any(
        has_product(inner)
        for body in jax.extend.core.jaxprs_in_params(eqn.params)
        for inner in body.eqns
    )


def least_between(eqns: list, wanted: list, there: Collection, may_run: Container[int]) -> list:
    """The variables of the fewest bytes from which the later part of a program can make what it wants.

    This is a smallest cut of a network. Each variable is a pipe that carries as much as it has bytes. The
    source feeds those that the later part cannot make by itself, the sink takes those that it wants; whoever
    keeps the variables of a cut has all that flows behind it (Dinic's algorithm). Of several smallest cuts
    this is the one nearest to what is wanted: the least is made again.

    Args:
      eqns: operations, in order.
      wanted: variables, or literals, which need nothing.
      there: variables that the later part has anyway.
      may_run: operations (`id`) that it may run.
    """
    there = {*there}
    maker = {var: eqn for eqn in eqns for var in eqn.outvars}
    room: dict = collections.defaultdict(dict)  # node -> node -> bytes that may still flow
    source, sink = "source", "sink"

    def pipe(start, end, size):
        room[start][end] = size
        room[end].setdefault(start, 0)

    left = [var for var in wanted if not hasattr(var, "val") and var not in there]
    seen: dict = {}  # in order: that of a set differs from run to run
    for var in left:
        pipe((var, "out"), sink, math.inf)
    while left:
        var = left.pop()
        if var in seen:
            continue
        seen[var] = eqn = maker.get(var)
        pipe((var, "in"), (var, "out"), math.prod(var.aval.shape) * var.aval.dtype.itemsize)
        if eqn is None or id(eqn) not in may_run:
            pipe(source, (var, "in"), math.inf)
            continue
        for operand in eqn.invars:
            if not hasattr(operand, "val") and operand not in there:
                pipe((operand, "out"), (var, "in"), math.inf)
                left.append(operand)

    def distances(start, is_open):
        """Steps from `start` to each node that it reaches."""
        found, queue = {start: 0}, collections.deque([start])
        while queue:
            node = queue.popleft()
            for other in room[node]:
                if other not in found and is_open(node, other):
                    found[other] = found[node] + 1
                    queue.append(other)
        return found

    # Round by round along all ways of the same length: a search for each way by itself would read the whole
    # network hundreds of times.
    while sink in (far := distances(source, lambda node, other: room[node][other] > 0)):
        onward = {node: [o for o in room[node] if far.get(o) == far[node] + 1] for node in far}
        way = [source]
        while way:
            node = way[-1]
            if node == sink:
                steps = list(itertools.pairwise(way))
                flow = min(room[start][end] for start, end in steps)
                for start, end in steps:
                    room[start][end] -= flow
                    room[end][start] += flow
                full = (place for place, (start, end) in enumerate(steps) if not room[start][end])
                del way[next(full) + 1 :]
            elif not onward[node]:  # a dead end
                way.pop()
                if way:
                    onward[way[-1]].pop()
            elif not room[node][onward[node][-1]]:
                onward[node].pop()
            else:
                way.append(onward[node][-1])
    reaches = distances(sink, lambda node, other: room[other][node] > 0)
    return [var for var in seen if (var, "out") in reaches and (var, "in") not in reaches]


def part_of(program: jax.extend.core.ClosedJaxpr, invars: list, eqns: list, outvars: list):
    """A function of `invars` that gives `outvars`: those of these operations of a program that they need."""
    eqns = needed(eqns, outvars, invars)
    part = program.jaxpr.replace(invars=invars, eqns=eqns, outvars=outvars)
    return jax.extend.core.jaxpr_as_fun(jax.extend.core.ClosedJaxpr(part, program.consts))


def needed(eqns: list, outvars: list, there: Collection = ()) -> list:
    """Those of a program's operations that its results depend on, where some variables are there already."""
    there, found = {*there}, []

    def missing(variables):
        return {var for var in variables if not hasattr(var, "val") and var not in there}

    wanted = missing(outvars)
    for eqn in reversed(eqns):
        if not wanted.isdisjoint(eqn.outvars):
            found.append(eqn)
            wanted |= missing(eqn.invars)
    return found[::-1]


def written_out(program: jax.extend.core.ClosedJaxpr, calls: Collection[str]):
    """The program with what these primitives call (`jit`, `remat2`, ...) written out in their place.

    What `jax.vmap` alone needs (`ALIKE`) is left out: it would make a result wait for what it is not made of.
    """
    eqns, constvars, consts = [], list(program.jaxpr.constvars), list(program.consts)

    def renamed(names, variables):
        return [var if hasattr(var, "val") else names[var] for var in variables]

    def write(body, names):
        """`names`: of the variables of `body`, which may be called more than once, in the program."""
        for eqn in body.eqns:
            operands = renamed(names, eqn.invars)
            if eqn.primitive.name in calls:
                inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
                of_inner = {}
                if isinstance(inner, jax.extend.core.ClosedJaxpr):
                    of_inner = {var: jax.extend.core.Var(var.aval) for var in inner.jaxpr.constvars}
                    constvars.extend(of_inner.values())
                    consts.extend(inner.consts)
                    inner = inner.jaxpr
                of_inner.update(zip(inner.invars, operands, strict=True))
                results = write(inner, of_inner)
            elif eqn.primitive.name == ALIKE:
                results = operands[:1]
            else:
                results = [jax.extend.core.Var(var.aval) for var in eqn.outvars]
                eqns.append(eqn.replace(invars=operands, outvars=results))
            names.update(zip(eqn.outvars, results, strict=True))
        return renamed(names, body.outvars)

    own = [*program.jaxpr.constvars, *program.jaxpr.invars]
    outvars = write(program.jaxpr, dict(zip(own, own)))
    jaxpr = program.jaxpr.replace(constvars=constvars, eqns=eqns, outvars=outvars)
    return jax.extend.core.ClosedJaxpr(jaxpr, consts)


def is_in(var, found: Container) -> bool:
    """Whether this operand of an operation is one of these variables."""
    return not hasattr(var, "val") and var in found  # a literal has a value and no hash


def varying(jaxpr: jax.extend.core.Jaxpr, changing: list) -> set:
    """The variables of a program that depend on `changing`."""
    found = set(changing)
    for eqn in jaxpr.eqns:
        operands = eqn.invars[:1] if eqn.primitive.name == ALIKE else eqn.invars
        if any(is_in(var, found) for var in operands):
            found.update(eqn.outvars)
    return found
