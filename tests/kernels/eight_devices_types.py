"""Run by test_types.py on 8 CPU devices: operations and connections in programs of others, against one device.

Explicit axes, `jax.shard_map` over all axes or some, gradients taken inside and outside, kernels interpreted.
"""

import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from interpreted import QUICK, normal
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import kernels_pallas as kp
from mhc_jax import (
    HyperConnections,
    Identity,
    ManifoldHyperConnections,
    Pending,
    Readout,
    Residual,
    expand,
)

n, C, LEAD = 2, 8, (8, 4)


def ops_loss(p, x, y, implementation="xla"):
    """A loss per token with every operation in it."""
    options = {"n": n, "num_iterations": 3, "implementation": implementation}
    norm = {"input_norm_weight": p["weight"], "input_norm_eps": 1e-6}
    parameters = p["phi"], p["bias"], p["alpha"]
    u, h_post, h_res, x = kp.read(x, *parameters, **options, **norm)
    u, h_post, h_res, x = kp.boundary(
        x, jnp.sin(u) + y, h_post, h_res, *parameters, **options, **norm
    )
    x = kp.post_res(x, jnp.sin(u), h_post, h_res, implementation=implementation)
    h_pre, _, h_res = kp.mappings(x, *parameters, **options)
    u = kp.pre(x, h_pre, norm_weight=p["weight"], norm_eps=1e-6, implementation=implementation)
    x = x + expand(kp.pre(x, h_pre, implementation=implementation), n)
    h_res = kp.sinkhorn(h_res, num_iterations=3, implementation=implementation)
    return jnp.cos(x).sum(-1) + jnp.sin(3 * h_res).sum((-2, -1)) + (u * u * u).sum(-1)


class Model(nnx.Module):
    """Every connection and read-out."""

    def __init__(self):
        self.mhc = ManifoldHyperConnections(C, n)
        self.identity = ManifoldHyperConnections(C, n, manifold=Identity())
        self.hc = HyperConnections(C, n, use_post=False)
        self.next = ManifoldHyperConnections(C, n, sublayer_index=1)
        self.head = Readout("head", C, n)
        self.sum = Readout("sum", C, n)


def model_loss(p, x, y):
    model = nnx.merge(GRAPH, p)
    for connection in (model.mhc, model.identity, model.hc):
        x = connection(x, lambda u: jnp.sin(u) + y)
    x, u, mappings = model.mhc.boundary(model.next.start(x))
    x, u, mappings = model.next.boundary(Pending(x, jnp.sin(u), mappings))
    x = model.next.post(x, jnp.sin(u), mappings)
    z = Residual()(model.head(x) + model.sum(x), jnp.sin)
    return jnp.cos(z).sum(-1)


GRAPH, _state = nnx.split(Model())
_rng = np.random.default_rng(0)
MODEL = jax.tree.map(
    lambda a: a + 0.3 * _rng.standard_normal(a.shape).astype(np.float32), nnx.to_pure_dict(_state)
)
OPS = {
    "phi": normal(2, n * C, 8, scale=0.1),
    "bias": normal(3, 8),
    "alpha": normal(4, 3),
    "weight": normal(5, C),
}
LOSSES = {"ops": (ops_loss, OPS), "connections": (model_loss, MODEL)}
X, Y = normal(0, *LEAD, n * C), normal(1, *LEAD, C)


def jit(function):
    return jax.jit(function, compiler_options=QUICK)


@functools.cache
def wanted(name):
    loss, parameters = LOSSES[name]
    f = jax.value_and_grad(lambda *args: loss(*args).sum(), (0, 1, 2))
    return jax.device_get(jit(f)(parameters, X, Y))


def check(case, name, got):
    got, want = (
        jax.tree_util.tree_leaves_with_path(jax.device_get(x)) for x in (got, wanted(name))
    )
    for (path, a), (_, b) in zip(got, want, strict=True):
        where = f"{case}, {name}: {jax.tree_util.keystr(path)}"
        # Sums of 32 tokens in another order.
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * np.abs(b).max(), err_msg=where)
    print("equal", case, name, flush=True)


def mesh_of(**axes):
    types = tuple(getattr(AxisType, kind) for _, kind in axes.values())
    return jax.make_mesh(tuple(size for size, _ in axes.values()), tuple(axes), axis_types=types)


def rows(mesh, x, axis):
    """Split over `axis` if the first dimension can be."""
    return P(axis) if axis and x.ndim and x.shape[0] % mesh.shape[axis] == 0 else P()


def place(mesh, parameters, tokens, axis):
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
    return (
        jax.tree.map(lambda x: put(x, rows(mesh, x, axis)), parameters),
        put(X, tokens),
        put(Y, tokens),
    )


def explicit(mesh, tokens, axis):
    """value_and_grad under jax.set_mesh: gradients have the types of their arguments."""

    def run(name):
        loss, parameters = LOSSES[name]
        args = place(mesh, parameters, tokens, axis)
        with jax.set_mesh(mesh):
            got = jit(jax.value_and_grad(lambda *args: loss(*args).sum(), (0, 1, 2)))(*args)
        types = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (args, got[1]))
        assert types[0] == types[1], types
        return got

    return run


def manual(mesh, tokens, *, inside, check_vma, axes=frozenset(), within=None):
    """The gradient outside or inside of a shard_map over `axes` (all by default)."""
    names = axes or set(mesh.axis_names)
    reduced = tuple(a for a in jax.tree.leaves(tuple(tokens)) if a in names)
    spec = P(*(a if a in names else None for a in tokens))

    def run(name):
        loss, parameters = LOSSES[name]

        def local(*args):
            return jax.lax.psum(loss(*args).sum(), reduced)

        def inner(parameters, x, y):
            if not inside:
                return local(parameters, x, y)
            if check_vma:
                return jax.value_and_grad(local, (0, 1, 2))(parameters, x, y)
            # Without types the transpose of psum is psum: the gradient of a local loss, summed by hand.
            value, (dp, dx, dy) = jax.value_and_grad(lambda *args: loss(*args).sum(), (0, 1, 2))(
                parameters, x, y
            )
            value, dp = jax.lax.psum((value, dp), reduced)
            return value, (dp, dx, dy)

        mapped = jax.shard_map(
            inner,
            mesh=mesh,
            in_specs=(P(), spec, spec),
            out_specs=(P(), (P(), spec, spec)) if inside else P(),
            check_vma=check_vma,
            axis_names=axes,
        )
        f = mapped if inside else jax.value_and_grad(mapped, (0, 1, 2))
        args = place(mesh, parameters, tokens, None)
        with within() if within else jax.set_mesh(mesh):
            return jit(f)(*args)

    return run


def cases():
    """Name, losses and how they run."""
    both, ops, connections = tuple(LOSSES), ("ops",), ("connections",)
    two = mesh_of(a=(4, "Explicit"), b=(2, "Explicit"))
    mixed = mesh_of(a=(4, "Explicit"), b=(2, "Auto"))
    yield "explicit, fsdp", connections, explicit(mesh_of(d=(8, "Explicit")), P("d"), "d")
    yield "explicit, two axes", both, explicit(two, P("a", "b"), "a")
    yield "explicit, two axes on one dimension", connections, explicit(two, P(("a", "b")), "b")
    yield "explicit and auto", both, explicit(mixed, P("a"), "a")
    auto = mesh_of(a=(4, "Auto"), b=(2, "Auto"))
    mixed = mesh_of(a=(4, "Auto"), b=(2, "Explicit"))
    for inside, check_vma in itertools.product((True, False), (True, False)):
        case = f"{inside=}, {check_vma=}"
        options = {"inside": inside, "check_vma": check_vma}
        yield f"manual, {case}", ops, manual(auto, P("a", "b"), **options)
        options["axes"] = {"a"}
        if inside == check_vma:
            yield f"manual and auto, {case}", ops, manual(auto, P("a", "b"), **options)
        else:
            yield f"manual and explicit, {case}", connections, manual(mixed, P("a", "b"), **options)


def main():
    for case, names, run in cases():
        for name in names:
            if all(word in f"{case}, {name}" for word in sys.argv[1:]):
                check(case, name, run(name))
    print("types ok")


if __name__ == "__main__":
    main()
