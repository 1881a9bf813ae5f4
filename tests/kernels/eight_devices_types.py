"""Run by test_types.py on 8 CPU devices: operations and connections in other people's programs.

Explicit axes, `jax.shard_map` over all axes or some, gradients taken inside and outside: against one device.
A case whose numbers another one has shown is traced alone: what goes wrong there is a type.
"""

import contextlib
import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import kernels_pallas as kp
from kernels_pallas.sharding import token_sharding
from kernels_pallas.testing.case import normal
from mhc_jax import (
    Birkhoff,
    HyperConnections,
    Identity,
    LookAheadConnections,
    ManifoldHyperConnections,
    Orthogonal,
    Pending,
    Readout,
    Residual,
    expand,
)
from mhc_jax.losses import linear_cross_entropy

n, C, LEAD = 2, 8, (8, 4)
WIDE = 64  # for kernels
OTHER = {"sinkhorn_eps": 0.01, "last": "columns", "pre_eps": 0.02}  # another convention


def ops_loss(p, x, y, implementation="xla", kp=kp):
    """A loss per token with every operation of `kp` in it."""
    options = {"n": n, "num_iterations": 2, "implementation": implementation}
    norm = {"input_norm_weight": p["weight"], "input_norm_eps": 1e-6}
    parameters = p["phi"], p["bias"], p["alpha"]
    u, h_post, h_res, x = kp.read(x, *parameters, **options, **norm)
    u, h_post, h_res, x = kp.boundary(
        x, jnp.sin(u) + y, h_post, h_res, *parameters, **options, **norm, **OTHER
    )
    x = kp.post_res(x, jnp.sin(u), h_post, h_res, implementation=implementation)
    h_pre, _, h_res = kp.mappings(x, *parameters, **options, **OTHER)
    u = kp.pre(x, h_pre, norm_weight=p["weight"], norm_eps=1e-6, implementation=implementation)
    x = x + expand(kp.pre(x, h_pre, implementation=implementation), n)
    other = {"eps": 0.03, "last": "columns"}
    h_res = kp.sinkhorn(h_res, num_iterations=2, implementation=implementation, **other)
    return jnp.cos(x).sum(-1) + jnp.sin(3 * h_res).sum((-2, -1)) + (u * u * u).sum(-1)


def kernel_loss(p, x, y, implementation="pallas"):
    """One operation with every kind of argument and result."""
    options = {"n": n, "num_iterations": 2, "implementation": implementation}
    u, h_post, h_res, x = kp.read(x, p["phi"], p["bias"], p["alpha"], **options)
    return jnp.sin(u + y).sum(-1) + jnp.cos(x).sum(-1) + (h_res * h_post[..., None]).sum((-2, -1))


class Model(nnx.Module):
    """Every connection and read-out."""

    def __init__(self):
        gate = {"alpha_init": 0.1}  # "auto" at this width would only magnify the rounding of sums
        other = {"manifold": Birkhoff(eps=0.01, last="columns"), "pre_eps": 0.02}
        self.mhc = ManifoldHyperConnections(C, n, **gate, **other)
        self.rotating = ManifoldHyperConnections(C, n, manifold=Orthogonal(), **gate)
        self.fixed = ManifoldHyperConnections(C, n, manifold=Identity(), static_res=True, **gate)
        self.hc = HyperConnections(C, n, use_post=False, **gate)
        self.next = ManifoldHyperConnections(C, n, sublayer_index=1, use_pre=False, **gate)
        self.ahead = LookAheadConnections(C, n, **gate)
        self.head = Readout("head", C, n, eps=0.03, **gate)
        self.sum = Readout("sum", C, n)


def model_loss(p, x, y):
    model, start = nnx.merge(GRAPH, p), x
    for connection in (model.mhc, model.rotating):
        x = connection(x, lambda u: jnp.sin(u) + y)
    z = Residual()(model.head(x) + model.sum(x), jnp.sin)
    # A second chain: in one, the rounding of the first sums would grow a thousandfold.
    x = model.fixed(start, lambda u: jnp.sin(u) + y)
    x, u, mappings = model.mhc.boundary(model.next.start(x))
    x, u, mappings = model.next.boundary(Pending(x, jnp.sin(u), mappings))
    x, u, mappings = model.hc.boundary(Pending(x, jnp.sin(u), mappings))
    x = model.hc.post(x, jnp.sin(u), mappings)
    x, u, mappings = model.ahead.boundary(model.ahead.begin(x))
    x, u, mappings = model.ahead.boundary(Pending(x, jnp.sin(u), mappings))
    x, _, mappings = model.ahead.settle(Pending(x, jnp.sin(u), mappings))
    u = Readout("prediction", C, n)(x, mappings.next_pre)
    return jnp.cos(z).sum(-1) + jnp.cos(u).sum(-1)


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
READ = {"phi": normal(2, n * WIDE, 8, scale=0.05), "bias": normal(3, 8), "alpha": normal(4, 3)}
X, Y = normal(0, *LEAD, n * C), normal(1, *LEAD, C)
LOSSES = {
    "ops": (ops_loss, OPS, X, Y),
    "connections": (model_loss, MODEL, X, Y),
    "kernels": (kernel_loss, READ, normal(6, 8, 16, n * WIDE), normal(7, 8, 16, WIDE)),
}


def call(function, *args):
    return function(*args)


def value_and_gradients(loss):
    return jax.value_and_grad(lambda *args: loss(*args).sum(), (0, 1, 2))


@functools.cache
def wanted(name):
    loss, *args = LOSSES[name]
    if name == "kernels":
        loss = functools.partial(loss, implementation="xla")
    return jax.device_get(jax.jit(value_and_gradients(loss))(*args))


def check(case, name, run, values):
    if not values:
        run(name, jax.eval_shape)
        print("traced", case, name, flush=True)
        return
    got, want = (
        jax.tree_util.tree_leaves_with_path(jax.device_get(x)) for x in (run(name), wanted(name))
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


def place(mesh, name, tokens, axis):
    """Arguments of a loss: tokens split, parameters split over `axis` where they can be."""
    _, parameters, x, y = LOSSES[name]
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
    parameters = jax.tree.map(lambda x: put(x, rows(mesh, x, axis)), parameters)
    return parameters, put(x, tokens), put(y, tokens)


def explicit(mesh, tokens, axis):
    """Under jax.set_mesh; gradients have the types of their arguments."""

    def run(name, evaluate=call):
        args = place(mesh, name, tokens, axis)
        with jax.set_mesh(mesh):
            got = evaluate(jax.jit(value_and_gradients(LOSSES[name][0])), *args)
        types = jax.tree.map(lambda x: (*x.sharding.spec, None, None)[:2], (args, got[1]))
        assert types[0] == types[1], types
        return got

    return run


def ensemble(mesh, members, axis):
    """Equal models under vmap over parameters alone, split over `members`, their tokens over `axis`.

    Member k counts k + 1 times, so that a sum over another axis, or one too many, shows.
    """
    weights = jnp.arange(1.0, 1 + mesh.shape[members], dtype=jnp.float32)

    def run(name, evaluate=call):
        loss = LOSSES[name][0]

        def total(stack, x, y):
            losses = jax.vmap(lambda p: loss(p, x, y).sum())(stack)
            return losses @ weights, losses

        def gradients(*args):
            (_, losses), (of_members, *of_tokens) = jax.value_and_grad(
                total, (0, 1, 2), has_aux=True
            )(*args)
            return losses, of_members, of_tokens

        def stacked(x):
            spec = NamedSharding(mesh, P(members, *(None,) * x.ndim))
            return jax.device_put(jnp.stack([x] * len(weights)), spec)

        parameters, x, y = place(mesh, name, P(axis), None)
        with jax.set_mesh(mesh):
            args = jax.tree.map(stacked, jax.device_get(parameters)), x, y
            losses, of_members, of_tokens = jax.device_get(evaluate(jax.jit(gradients), *args))
        np.testing.assert_allclose(losses, losses[0], rtol=1e-6)
        for leaf in jax.tree.leaves(of_members):
            one = leaf / np.asarray(weights).reshape(-1, *(1,) * (leaf.ndim - 1))
            np.testing.assert_allclose(one, one[:1] + 0 * one, rtol=1e-5, atol=1e-5)
        dx, dy = (d / np.sum(weights) for d in of_tokens)
        return losses[0], (jax.tree.map(lambda x: x[0], of_members), dx, dy)

    return run


def manual(mesh, tokens, *, inside, check_vma, axes=frozenset()):
    """The gradient outside or inside of a shard_map over `axes` (all by default)."""
    names = axes or set(mesh.axis_names)
    spec = P(*(a if a in names else None for a in tokens))
    reduced = tuple(a for a in tokens if a in names)

    def run(name, evaluate=call):
        loss = LOSSES[name][0]

        def local(*args):
            return jax.lax.psum(loss(*args).sum(), reduced)

        def gradients(*args):
            if check_vma:
                return jax.value_and_grad(local, (0, 1, 2))(*args)
            # Without types the transpose of psum is psum: take the gradient of this device's loss.
            value, (d_parameters, dx, dy) = value_and_gradients(loss)(*args)
            value, d_parameters = jax.lax.psum((value, d_parameters), reduced)
            return value, (d_parameters, dx, dy)

        mapped = jax.shard_map(
            gradients if inside else local,
            mesh=mesh,
            in_specs=(P(), spec, spec),
            out_specs=(P(), (P(), spec, spec)) if inside else P(),
            check_vma=check_vma,
            axis_names=axes,
        )
        f = mapped if inside else jax.value_and_grad(mapped, (0, 1, 2))
        with jax.set_mesh(mesh):
            return evaluate(jax.jit(f), *place(mesh, name, tokens, None))

    return run


def interpreted(run, mode=True, tokens=None):
    """`run` with Pallas kernels interpreted, under `token_sharding` if there are `tokens`."""

    def interpreted_run(name, *evaluate):
        with pltpu.force_tpu_interpret_mode(mode):
            if tokens is None:
                return run(name, *evaluate)
            with token_sharding(*tokens):
                return run(name, *evaluate)

    return interpreted_run


def cases():
    """Name, losses, how they run and whether their numbers are compared."""
    both, ops, connections = ("ops", "connections"), ("ops",), ("connections",)
    two = mesh_of(a=(4, "Explicit"), b=(2, "Explicit"))
    mixed = mesh_of(a=(4, "Explicit"), b=(2, "Auto"))
    yield "explicit, fsdp", connections, explicit(mesh_of(d=(8, "Explicit")), P("d"), "d"), True
    yield "explicit, two axes", ops, explicit(two, P("a", "b"), "a"), True
    yield "explicit, two axes", connections, explicit(two, P("a", "b"), "a"), False
    yield "explicit, two axes on one dimension", both, explicit(two, P(("a", "b")), "b"), False
    yield "ensemble, explicit", ops, ensemble(two, "a", "b"), True
    yield "explicit and auto", connections, explicit(mixed, P("a"), "a"), True
    auto = mesh_of(a=(4, "Auto"), b=(2, "Auto"))
    mixed = mesh_of(a=(4, "Auto"), b=(2, "Explicit"))
    for inside, check_vma in itertools.product((True, False), (True, False)):
        case = f"{inside=}, {check_vma=}"
        options = {"inside": inside, "check_vma": check_vma}
        yield f"manual, {case}", ops, manual(auto, P("a", "b"), **options), inside == check_vma
        yield f"manual, {case}", connections, manual(auto, P("a", "b"), **options), False
        options["axes"] = {"a"}
        yield f"manual and auto, {case}", ops, manual(auto, P("a", "b"), **options), False
        partly = manual(mixed, P("a", "b"), **options)
        yield f"manual and explicit, {case}", connections, partly, inside > check_vma


def kernel_cases():
    auto = mesh_of(a=(4, "Auto"), b=(2, "Auto"))
    two = mesh_of(a=(4, "Explicit"), b=(2, "Explicit"))
    tokens = P("a", "b")
    yield "explicit", interpreted(explicit(two, tokens, "a")), True
    # The simple interpreter does not say what varies.
    typed = manual(auto, tokens, inside=True, check_vma=True)
    typed = interpreted(typed, pltpu.InterpretParams())
    yield "manual, inside=True, check_vma=True", typed, False
    partly = manual(auto, tokens, inside=False, check_vma=False, axes={"a"})
    yield "manual and token_sharding", interpreted(partly, tokens=(auto, *tokens)), True


def check_vmap_over_mesh_axes():
    """`jax.vmap` over the axis of a mesh that splits tokens, over another one, and over an Explicit one."""
    mesh = mesh_of(data=(4, "Auto"), tensor=(2, "Auto"))
    targets = jnp.asarray(np.random.default_rng(0).integers(0, 6, (4, 8, 2)))
    matrix, bias = normal(1, C, 6), normal(3, 8)

    def chunked(x, y, matrix, targets):
        return linear_cross_entropy(x * y, matrix, targets, 2)

    def of_kernel(x, y, phi, bias, implementation):
        p = {"phi": phi, "bias": bias, "alpha": READ["alpha"]}
        return kernel_loss(p, x, y, implementation).sum()

    losses = {
        "chunked loss": (
            chunked,
            chunked,
            (normal(0, 4, 8, 2, C), normal(4, 4, 8, 2, C), matrix, targets),
        ),
        "kernel": (
            functools.partial(of_kernel, implementation="pallas"),
            functools.partial(of_kernel, implementation="xla"),
            (normal(0, 4, 8, 2, n * WIDE), normal(4, 4, 8, 2, WIDE), READ["phi"], bias),
        ),
    }
    for name, (loss, definition, args) in losses.items():
        axes = (0, 0, None, 0 if name == "chunked loss" else None)

        def run(loss, axes=axes, args=args, **options):
            """Gradients of each mapped loss, and those of all together: their backward is mapped later."""
            each = jax.vmap(jax.value_and_grad(loss, (0, 1, 2)), axes, **options)
            mapped = jax.vmap(loss, axes, **options)
            together = jax.grad(lambda *args: mapped(*args).sum(), (0, 1, 2))
            return jax.device_get(jax.jit(lambda *args: (each(*args), together(*args)))(*args))

        want = run(definition)
        for axis in ("data", "tensor", "explicit"):
            if axis == "explicit":
                if name == "kernel":  # see `ensemble`
                    continue
                typed = mesh_of(data=(4, "Explicit"), tensor=(2, "Explicit"))
                put = [NamedSharding(typed, P() if at is None else P("data")) for at in axes]
                with jax.set_mesh(typed):
                    got = run(loss, args=jax.device_put(args, tuple(put)))
            else:
                with token_sharding(mesh, "data"), pltpu.force_tpu_interpret_mode(True):
                    got = run(loss, spmd_axis_name=axis)
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                limit = 2e-5 * np.abs(b).max()
                np.testing.assert_allclose(a, b, rtol=2e-5, atol=limit, err_msg=f"{name}, {axis}")
            print("equal", name, axis, flush=True)


def check_scans_beside_a_manual_axis():
    """Gradients through `jax.lax.scan` in a `shard_map` over one axis, where another one splits tokens too.

    JAX splits the body into what is known before and the rest, `shard_map`s in it as well: see `opaque`.
    """
    graph, state = nnx.split(HyperConnections(C, n, alpha_init=0.1))
    blocks = jax.tree.map(lambda x: jnp.stack([x, x + 0.2]), state)
    matrix, targets = normal(1, n * C, 6), jnp.asarray(_rng.integers(0, 6, LEAD))

    def through_blocks(blocks, x):
        body = jax.checkpoint(lambda x, block: (nnx.merge(graph, block)(x, jnp.sin), None))
        return jnp.sum(jax.lax.scan(body, x, blocks)[0] ** 2)

    def of_members(blocks, x):
        return jax.vmap(through_blocks, (None, 1))(blocks, x[:, None]).sum()

    def losses(matrices, x):
        rows = jnp.broadcast_to(targets[0], x.shape[:2])

        def body(total, matrix):
            return total + linear_cross_entropy(x, matrix, rows, 1), None

        return len(x) * jax.lax.scan(body, 0 * x[0, 0, 0], matrices)[0]

    matrices = jnp.stack([matrix, -matrix])
    typed, auto = mesh_of(a=(4, "Auto"), b=(2, "Explicit")), mesh_of(a=(4, "Auto"), b=(2, "Auto"))
    for name, loss, parameters, mesh in (
        ("blocks, explicit", through_blocks, blocks, typed),
        ("members, explicit", of_members, blocks, typed),
        ("blocks, token_sharding", through_blocks, blocks, auto),
        ("loss, token_sharding", losses, matrices, auto),
    ):

        def local(parameters, x, loss=loss):
            return jax.lax.psum(loss(parameters, x), "a")

        mapped = jax.shard_map(
            local, mesh=mesh, in_specs=(P(), P("a")), out_specs=P(), axis_names={"a"}
        )
        spec = P("a", "b") if mesh is typed and loss is through_blocks else P("a")
        where = token_sharding(mesh, None, "b") if mesh is auto else contextlib.nullcontext()
        with jax.set_mesh(mesh), where:
            x = jax.device_put(X, NamedSharding(mesh, spec))
            got = jax.jit(jax.grad(mapped, (0, 1)))(parameters, x)
        want = jax.grad(loss, (0, 1))(parameters, X)
        for a, b in zip(*map(jax.tree.leaves, jax.device_get((got, want))), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max(), err_msg=name)
        print("equal", name, flush=True)


def main():
    for case, names, run, values in cases() if sys.argv[1] == "xla" else ():
        for name in names:
            check(case, name, run, values)
    for case, run, values in kernel_cases() if sys.argv[1] == "kernels" else ():
        check(case, "kernels", run, values)
    if sys.argv[1] == "kernels":
        check_vmap_over_mesh_axes()
        check_scans_beside_a_manual_axis()
    print("types ok")


if __name__ == "__main__":
    main()
