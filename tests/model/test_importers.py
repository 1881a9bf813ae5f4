"""The model in other people's programs: meshes, dtype rules, errors. Programs are traced, not compiled.

What goes wrong here is a type, and JAX checks types while it traces. Numbers: kernels/test_types.py and
eight_devices.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import kernels_pallas as kp
from configs import default
from mhc_jax import (
    Birkhoff,
    HyperConnections,
    Identity,
    LookAheadConnections,
    ManifoldHyperConnections,
    Mappings,
    Orthogonal,
    Pending,
    Readout,
    Residual,
    expand,
    fused_attention,
    inference,
)
from mhc_jax.config import from_dict
from mhc_jax.gains import gain_magnitudes
from mhc_jax.train_step import (
    abstract_batch,
    abstract_state,
    evaluate,
    jit_train_step,
    loss_fn,
    measure_gains,
)
from mhc_jax.transformer import Transformer

n, C = 4, 8
LATENT = {
    "model.attention": "mla", "model.head_dim": 8, "model.rope_dim": 4, "model.kv_rank": 12,
    "model.num_blocks": 3, "model.leading_dense_blocks": 1,
}  # fmt: skip
EXPERTS = LATENT | {
    "model.num_experts": 4, "model.experts_per_token": 2, "model.shared_experts": 1,
    "model.expert_width": 8, "model.sequence_balance_weight": 1e-3,
}  # fmt: skip
MODELS = {
    "dense": {"model.loss_chunks": 2},
    "dropless experts": EXPERTS | {"model.moe_dispatch": "dropless"},
    "experts with capacity": EXPERTS | {"model.moe_dispatch": "capacity", "model.connection": "hc"},
    "tied, recomputed": {
        "model.remat": "mhc", "model.tie_embeddings": True, "model.readout": "head",
    },
}  # fmt: skip


@functools.cache
def model(name, dtype="float32", accumulate_steps=1):
    config = default.get_config()
    config.update_from_flattened_dict(
        {
            "steps": 6, "batch_size": 8, "model.vocab_size": 64, "model.num_blocks": 2,
            "model.width": 16, "model.num_heads": 2, "model.ffn_width": 32, "model.dtype": dtype,
            "optimizer.warmup_steps": 2, "optimizer.accumulate_steps": accumulate_steps,
            "data.source": "synthetic", "data.sequence_length": 16,
        }
        | MODELS[name]
    )  # fmt: skip
    return from_dict(config)


def arguments(config):
    state, batch = abstract_state(config), abstract_batch(config)
    return state.params, state.model_state, batch


def loss_of(config):
    return lambda *args: loss_fn(*args, config.model)[0]


def mesh_of(**kinds):
    sizes = {"a": 4, "b": 2}
    types = tuple(getattr(AxisType, kind) for kind in kinds.values())
    return AbstractMesh(tuple(sizes[name] for name in kinds), tuple(kinds), axis_types=types)


@pytest.mark.parametrize(
    ("name", "tokens"),
    [(name, P("a", "b")) for name in MODELS]
    + [("dropless experts", P(("a", "b"))), ("experts with capacity", P("a"))],
)
def test_explicit_axes(name, tokens):
    """Gradients have the types of the parameters, which the first axis splits where it can."""
    mesh, config = mesh_of(a="Explicit", b="Explicit"), model(name)

    def split(x, spec):
        spec = (*spec, *(None,) * (x.ndim - len(spec)))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P(*spec)))

    def fsdp(x):
        divided = [i for i, size in enumerate(x.shape) if size % 4 == 0]
        return split(x, (None,) * divided[-1] + ("a",) if divided else ())

    params, state, batch = arguments(config)
    params, state = jax.tree.map(fsdp, params), jax.tree.map(lambda x: split(x, ()), state)
    batch = jax.tree.map(lambda x: split(x, tokens), batch)
    with jax.sharding.use_abstract_mesh(mesh):
        gradients = jax.eval_shape(jax.jit(jax.grad(loss_of(config))), params, state, batch)
    for want, got in zip(jax.tree.leaves(params), jax.tree.leaves(gradients), strict=True):
        assert got.sharding.spec == want.sharding.spec


@pytest.mark.parametrize(
    ("name", "mapped", "tokens"),
    [
        ("dense", "tensor", P("data", "sequence")),
        ("dropless experts", "expert", P("data")),
        ("experts with capacity", "fsdp", P("data")),
        ("tied, recomputed", "data", None),
    ],
)
def test_vmap_of_a_model_over_an_axis_that_is_split(name, mapped, tokens):
    """`mapped` splits the models of an ensemble, or sequences (`tokens` None), and has a use in one model."""
    axes = ("data", "fsdp", "tensor", "expert", "sequence")
    mesh = AbstractMesh((2,) * 5, axes, axis_types=(AxisType.Explicit,) * 5)
    config = model(name)

    def split(x, *spec, members=()):
        spec = NamedSharding(mesh, P(*spec, *(None,) * (len(members) + x.ndim - len(spec))))
        return jax.ShapeDtypeStruct((*members, *x.shape), x.dtype, sharding=spec)

    params, state, batch = arguments(config)
    state = jax.tree.map(split, state)
    if tokens is None:
        params = jax.tree.map(split, params)
        batch = jax.tree.map(lambda x: split(x, mapped, members=(2,)), batch)
    else:
        params = jax.tree.map(lambda x: split(x, mapped, members=(2,)), params)
        batch = jax.tree.map(lambda x: split(x, *tokens), batch)
    gradient = jax.vmap(
        jax.grad(loss_of(config)), (None, None, 0) if tokens is None else (0, None, None)
    )
    with jax.sharding.use_abstract_mesh(mesh):
        gradients = jax.eval_shape(jax.jit(gradient), params, state, batch)
    assert {leaf.sharding.spec[0] for leaf in jax.tree.leaves(gradients)} == {mapped}


@pytest.mark.parametrize("shape", [(0, 16), (2, 0)])
@pytest.mark.parametrize("name", MODELS)
def test_a_batch_without_tokens(name, shape):
    config, tokens = model(name).model, jnp.zeros(shape, jnp.int32)
    logits = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))(tokens))
    assert logits.shape == (*shape, config.vocab_size)


@pytest.mark.parametrize("name", MODELS)
def test_manual_axes(name):
    """In `jax.shard_map` over all axes or some; its types checked or not; gradients inside or outside."""
    mesh, config = mesh_of(a="Auto", b="Auto"), model(name)
    params, state, batch = arguments(config)
    for axes, inside, check_vma in (
        ({"a", "b"}, True, True),
        ({"a"}, False, True),
        ({"a"} if name == "dense" else {"a", "b"}, name == "dense", False),
    ):

        def loss(*args, axes=axes):
            return jax.lax.pmean(loss_of(config)(*args), tuple(sorted(axes)))

        mapped = jax.shard_map(
            jax.grad(loss) if inside else loss,
            mesh=mesh,
            in_specs=(P(), P(), P(tuple(sorted(axes)))),
            out_specs=P(),
            axis_names=axes,
            check_vma=check_vma,
        )
        gradients = jax.eval_shape(
            jax.jit(mapped if inside else jax.grad(mapped)), params, state, batch
        )
        assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(jnp.shape, params)


@pytest.fixture
def strict_and_64_bit():
    """No implicit promotion, and literals of 64 bits: what mixes dtypes anywhere fails."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        yield
    # What was traced here keeps its 64-bit constants.
    model.cache_clear()
    abstract_state.cache_clear()


def lowered(function, *args):
    """Shapes and dtypes of the outputs; lowered, since some branches by platform are traced only there."""
    return jax.jit(function).lower(*args).out_info


@pytest.mark.parametrize(
    ("dtype", "of_parameters"),
    [("bfloat16", "float32"), ("float32", "bfloat16"), ("float64", "float32")],
)
def test_connections_by_the_strictest_dtype_rules(strict_and_64_bit, dtype, of_parameters):
    x = jax.ShapeDtypeStruct((2, 3, n * C), dtype)
    for module in (
        ManifoldHyperConnections(C, n),
        ManifoldHyperConnections(C, n, manifold=Identity()),
        HyperConnections(C, n),
        HyperConnections(C, n, use_pre=False, use_post=False, use_res=False),
        *(Readout(kind, C, n) for kind in ("sum", "mean", "head")),
    ):
        graph, state = nnx.split(module)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state))
        state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, of_parameters), state)

        def loss(state, x, graph=graph):
            module = nnx.merge(graph, state)
            if isinstance(module, Readout):
                x = module(x)
            else:
                x = module(x, lambda u: u * u)
                x, u, mappings = module.boundary(module.start(x))
                x = module.post(x, u, mappings)
            assert x.dtype == dtype
            return x.astype(jnp.float32).sum()

        gradients = lowered(jax.grad(loss, (0, 1)), state, x)
        of = functools.partial(jax.tree.map, lambda leaf: leaf.dtype)
        assert of(gradients) == of((state, x))


def plain_attention(q, k, v, *, offset=None):
    logits = jnp.einsum("bshd,bthd->bhst", q, k).astype(jnp.float32)
    return jnp.einsum("bhst,bthd->bshd", jax.nn.softmax(logits).astype(v.dtype), v)


@pytest.mark.parametrize(("name", "dtype"), list(zip(MODELS, ("bfloat16", "float32") * 2)))
def test_training_by_the_strictest_dtype_rules(strict_and_64_bit, monkeypatch, name, dtype):
    """A step gives the dtypes that it takes; evaluation, gains and sampling too are lowered."""
    config = model(name, dtype, 2 if name == "dense" else 1)
    state, batch = abstract_state(config), abstract_batch(config)
    if (
        dtype == "bfloat16"
    ):  # JAX's own rule for the backward of its attention refuses strict promotion
        monkeypatch.setattr(fused_attention, "_unfused", plain_attention)
    dtypes = functools.partial(jax.tree.map, lambda leaf: leaf.dtype)
    new, metrics = lowered(jit_train_step(config), state, batch)
    assert dtypes(new) == dtypes(state)
    assert {leaf.dtype for leaf in metrics.values()} == {jnp.dtype(jnp.float32)}
    loss = lowered(functools.partial(evaluate, config=config.model), state.variables, batch)
    assert loss.dtype == jnp.float32
    one = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    gains = functools.partial(measure_gains, config=config.model)
    measured = jax.tree.leaves(lowered(gains, state.variables, one))
    assert {leaf.dtype for leaf in measured} == {jnp.dtype(jnp.float32)}
    for_sampling = inference.for_sampling(config.model)
    past = jax.eval_shape(lambda: inference.init_decode(for_sampling, 1, 8))
    decode = functools.partial(inference.decode, config=for_sampling)
    _, after = lowered(decode, state.variables, jax.ShapeDtypeStruct((1, 2), jnp.int32), past)
    assert dtypes(after) == dtypes(past)


X, U = jnp.ones((2, n * C)), jnp.ones((2, C))
PHI, BIAS, ALPHA = jnp.zeros((n * C, 24)), jnp.zeros(24), jnp.zeros(3)
H_POST, H_RES = jnp.ones((2, n)), jnp.ones((2, n, n))
MHC, HC = ManifoldHyperConnections(C, n), HyperConnections(C, n)


def tokens_over(mesh, *axes):
    with kp.token_sharding(mesh, *axes):
        raise AssertionError("no error")


ERRORS = {
    "streams [..., C], mhc": (lambda: MHC(U, jnp.sin), r"streams \(2, 8\).*4 \* 8 = 32: widen"),
    "streams [..., C], hc": (lambda: HC(U, jnp.sin), r"streams \(2, 8\).*4 \* 8 = 32: widen"),
    "streams [..., C], post": (lambda: MHC.post(U, U, Mappings(H_POST, H_RES)), "widen"),
    "streams [..., C], post_res": (
        lambda: kp.post_res(U, U, H_POST, H_RES),
        r"streams are \(2, 8\), n = 4 of width C = 2",
    ),
    "streams [..., C], read": (lambda: kp.read(U, PHI, BIAS, ALPHA, n=n), "streams .* do not fit"),
    "streams [..., C], mappings": (lambda: kp.mappings(U, PHI, BIAS, ALPHA, n=n), "do not fit"),
    "streams [..., C], readout": (lambda: Readout("sum", C, n)(U), "4 \\* 8 = 32: widen"),
    "another width": (lambda: Readout("mean", 2 * C, n)(X), r"4 \* 16 = 64"),
    "a layer's tuple": (lambda: MHC(X, lambda u: (u, 1)), "layer_output is a tuple: a layer has"),
    "a layer's tuple, residual": (lambda: Residual()(U, lambda u: (u,)), "is a tuple: a layer has"),
    "a layer's None": (lambda: MHC(X, lambda u: None), "layer_output is None"),
    "a layer's dtype": (
        lambda: MHC(X, lambda u: u.astype(jnp.bfloat16)),
        r"layer_output is bfloat16, the streams are float32: use layer_output.astype",
    ),
    "mappings of residual": (lambda: MHC.post(X, U, Mappings(None, None)), "h_post is None"),
    "integer logits": (lambda: kp.sinkhorn(jnp.ones((4, 4), int)), "logits is int32: use a floating"),
    "complex logits": (lambda: kp.sinkhorn(jnp.ones((4, 4), complex)), "complex64.*logits.real"),
    "a list": (lambda: kp.sinkhorn([[1.0]]), "logits is a list, not an array: use jnp.asarray"),
    "a list of streams": (lambda: MHC([1.0] * 32, jnp.sin), "streams is a list"),
    "a list of gains": (lambda: gain_magnitudes([[1.0]]), r"h_res must be \[L, ..., n, n\]"),
    "a list to widen": (lambda: expand([1.0], n), "x is a list"),
    "float16": (lambda: MHC(X.astype(jnp.float16), jnp.sin), "float16: use bfloat16 or float32"),
    "no streams": (lambda: Readout("sum", C, 0), "n=0: the number of streams must be at least 1"),
    "no width": (lambda: Readout("head", 0, n), "width=0: the width C of a stream must be at"),
    "an axis less": (lambda: expand(jnp.ones(()), n), r"x has shape \(\): widen an array"),
    "streams of a truth": (lambda: HyperConnections(True, n), "width=True: .* must be an integer"),
    "half a stream, op": (lambda: kp.read(X, PHI, BIAS, ALPHA, n=4.0), "n=4.0: .* must be an integer"),
    "half a stream": (lambda: ManifoldHyperConnections(C, 1.5), "n=1.5: .* must be an integer"),
    "a class": (lambda: ManifoldHyperConnections(C, n, manifold=Identity), r"use Identity\(\)"),
    "half an index": (
        lambda: ManifoldHyperConnections(C, n, sublayer_index=0.5), "sublayer_index=0.5: use an integer",
    ),
    "index below 0": (lambda: HyperConnections(C, n, sublayer_index=-1), "=-1: .* count from 0"),
    "no index": (lambda: LookAheadConnections(C, n, sublayer_index=None), "sublayer_index=None: use"),
    "indices": (
        lambda: HyperConnections(C, n, sublayer_index=jnp.arange(4)),
        r"sublayer_index has shape \(4,\): .* under jax.vmap",
    ),
    "gap": (
        lambda: ManifoldHyperConnections(C, n, pre_init_gap=jnp.nan), "pre_init_gap=nan: use a finite",
    ),
    "gap of h_res": (
        lambda: ManifoldHyperConnections(C, n, res_init_gap=-8), "res_init_gap=-8: use a finite",
    ),
    "gap in words": (
        lambda: ManifoldHyperConnections(C, n, res_init_gap="8"), "res_init_gap='8': use a number",
    ),
    "eps below 0": (lambda: ManifoldHyperConnections(C, n, norm_eps=-1), "norm_eps=-1.0: use 0.0 or a"),
    "eps of HC": (lambda: HyperConnections(C, n, norm_eps=jnp.nan), "norm_eps=nan: use 0.0 or a"),
    "eps of the head": (lambda: Readout("head", C, n, norm_eps="1"), "norm_eps is a str, not a number"),
    "eps of an op": (lambda: kp.hc_read(X, PHI.T[:6, :C], BIAS, ALPHA, n=n, norm_eps=-1), "norm_eps=-1.0"),
    "eps of a projection": (lambda: kp.projection(X, PHI, norm_eps=-1), "norm_eps=-1.0: use 0.0"),
    "eps of the input's norm": (
        lambda: kp.read(X, PHI, BIAS, ALPHA, n=n, input_norm_eps=-1), "input_norm_eps=-1.0: use 0.0",
    ),
    "weight without eps": (
        lambda: kp.read(X, PHI, BIAS, ALPHA, n=n, input_norm_weight=U[0]),
        "input_norm_weight was given without input_norm_eps",
    ),
    "alpha": (lambda: HyperConnections(C, n, alpha_init=None), "alpha_init=None must be a finite"),
    "streams without axes": (
        lambda: ManifoldHyperConnections(C, n).pre(jnp.float32(1)), r"\(\): the last axis has to be n\*C = ",
    ),
    "streams of width 0": (
        lambda: ManifoldHyperConnections(C, n).pre(X[:, :0]), r"the last axis has to be n\*C = ",
    ),
    "an implementation": (
        lambda: ManifoldHyperConnections(C, n, implementation="cdua"), "'cdua' is unknown: use None, one",
    ),
    "implementations": (lambda: Readout("sum", C, n, implementation=["xla"]), r"\['xla'\] is unknown"),
    "a switch": (lambda: HyperConnections(C, n, use_pre="False"), "use_pre='False': use True or False"),
    "no manifold": (
        lambda: ManifoldHyperConnections(C, n, manifold=3),
        "manifold is a int without num_logits, initial_logits, project: use an instance",
    ),
    "half an iteration": (lambda: Birkhoff(2.5), "num_iterations=2.5: use an integer"),
    "limit": (lambda: Orthogonal("8"), "limit='8' must be positive and finite"),
    "coefficients without streams": (
        lambda: kp.coefficients(X[:, :0], X[:, 0], BIAS[:0], ALPHA, n=0), "n=0: .* at least 1",
    ),
    "a vector for phi": (lambda: kp.projection(X, BIAS), r"phi has shape \(24,\), expected \(32, m\)"),
    "F(x) for F": (lambda: MHC(X, U), "layer is a ArrayImpl, which cannot be called: pass F itself"),
    "streams for a pending write": (lambda: MHC.boundary(X), "pending is a ArrayImpl: use Pending"),
    "no mappings": (lambda: MHC.post(X, U, None), "mappings is a NoneType: pass the Mappings that"),
    "no pending mappings": (lambda: HC.boundary(Pending(X, U, None)), "mappings is a NoneType: pass"),
    "mappings of mHC to look-ahead": (
        lambda: LookAheadConnections(C, n).boundary(Pending(X, U, Mappings(H_POST, H_RES))),
        "has Mappings of another connection: .* begins with connection.begin",
    ),
    "a norm of flax": (
        lambda: MHC.read(X, nnx.RMSNorm(C, rngs=nnx.Rngs(0))),
        r"norm is a flax\.nnx\S*RMSNorm: use mhc_jax.layers.RMSNorm",
    ),
    "no mesh": (lambda: tokens_over(None, "a"), "mesh is a NoneType: use a jax.sharding.Mesh"),
    "an axis that is no name": (lambda: tokens_over(mesh_of(a="Auto"), 0), "axis 0: use the name of a"),
    "an axis twice": (
        lambda: tokens_over(mesh_of(a="Auto"), "a", ("a",)), "axis 'a' is named twice: it splits one",
    ),
    "precision": (lambda: HyperConnections(C, n, phi_precision="f32"), "'f32' is unknown: use one"),
    "precision of the head": (lambda: Readout("head", C, n, phi_precision="x"), "'x' is unknown"),
    "precision of bfloat16": (
        lambda: kp.projection(X.astype(jnp.bfloat16), PHI, phi_precision="highest"),
        "'highest' is for float32 streams, these are bfloat16",
    ),
    "pallas on a CPU": (
        lambda: kp.read(
            jnp.ones((16, n * 128)), jnp.ones((n * 128, 24)), BIAS, ALPHA, n=n,
            implementation="pallas",
        ),
        "read: implementation='pallas' needs a TPU, this program is for a CPU: use None",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_what_was_passed(case):
    call, message = ERRORS[case]
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=message) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spec", [P(None, "a"), P("b", "a"), P(None, ("a", "b"))], ids=str)
def test_a_token_that_is_split_is_refused_by_name(spec):
    mesh = mesh_of(a="Explicit", b="Explicit")
    x = jax.ShapeDtypeStruct((16, n * C), jnp.float32, sharding=NamedSharding(mesh, spec))
    with jax.sharding.use_abstract_mesh(mesh):
        for call in (lambda x: MHC(x, jnp.sin), lambda x: HC(x, jnp.sin), Readout("sum", C, n)):
            with pytest.raises(ValueError, match=r"streams? \(16, \d+\) is split.*'a'.*whole"):
                jax.eval_shape(call, x)


def test_vmap_over_an_axis_that_is_split():
    """A model for one sequence under vmap over a batch: each device has its own sequences, also backward."""
    for kinds in ({"a": "Explicit", "b": "Explicit"}, {"a": "Explicit", "b": "Auto"}):
        mesh = mesh_of(**kinds)
        spec = NamedSharding(mesh, P("a", None, None))
        x = jax.ShapeDtypeStruct((8, 3, n * C), jnp.float32, sharding=spec)
        for module in (MHC, ManifoldHyperConnections(C, n, manifold=Orthogonal()), HC):

            def loss(module, x):
                return jax.vmap(lambda x: (Readout("head", C, n)(module(x, jnp.sin)) ** 2).sum())(
                    x
                ).sum()

            with jax.sharding.use_abstract_mesh(mesh):
                traced = jax.jit(jax.grad(loss, (0, 1))).trace(module, x)
                of_parameters, _ = traced.out_info
            assert traced.jaxpr.out_avals[-1].sharding.spec == P("a", None, None)
            for got, want in zip(jax.tree.leaves(of_parameters), jax.tree.leaves(module)):
                assert got.shape == want.shape


def test_gradient_of_what_an_ensemble_shares():
    """vmap over parameters alone: results that depend on the streams alone count once, not once a model."""
    phi = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 4)), jnp.float32)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8)), jnp.float32)

    def loss(phi, x):
        s, r = kp.projection(x, phi)
        u, h_post, _, streams = kp.read_logits(x, phi, phi[0], phi[0, :3], n=2)
        return sum(jnp.sum(a**3) for a in (s, r, u, h_post, streams))

    def each(phi, x):
        return sum(loss(one, x) for one in phi)

    def mapped(phi, x):
        return jax.vmap(loss, (0, None))(phi, x).sum()

    wanted, found = (jax.jit(jax.grad(f, (0, 1)))(phi, x) for f in (each, mapped))
    for a, b in zip(wanted, found):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_second_gradient_of_what_an_ensemble_shares():
    """The results of a backward count once too, here the gradient of h_post, which h_res has no part in."""
    rng = np.random.default_rng(0)
    x, y, h_post, h_res, d = (
        jnp.asarray(rng.normal(size=size), jnp.float32)
        for size in ((2, 8), (2, 4), (2, 2), (3, 2, 2, 2), (2, 8))
    )

    def inner(h_res, x, y, h_post, d):
        def f(*args):
            return jnp.vdot(kp.post_res(*args), d)

        return sum(jnp.sin(g).sum() for g in jax.grad(f, (0, 1, 2, 3))(x, y, h_post, h_res))

    def each(h_res, *shared):
        return sum(inner(one, *shared) for one in h_res)

    def mapped(h_res, *shared):
        return jax.vmap(inner, (0, *(None,) * 4))(h_res, *shared).sum()

    args = h_res, x, y, h_post, d
    wanted, found = (jax.jit(jax.grad(f, (0, 1, 2, 3, 4)))(*args) for f in (each, mapped))
    for a, b in zip(wanted, found):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_streams_are_kept_once():
    """What a boundary keeps for its backward and what the next one keeps are the same array."""

    def f(x):
        x, u, mappings = MHC.read(x)
        for _ in range(2):
            x, u, mappings = MHC.boundary(Pending(x, jnp.sin(u), mappings))
        return x, u, mappings

    x = jax.ShapeDtypeStruct((3, n * C), jnp.float32)
    kept = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(f, x)[1], x))
    # Those of the read, and what the two boundaries have written.
    assert [leaf.shape for leaf in kept].count(x.shape) == 3


def test_gains_of_mappings_on_explicit_axes():
    mesh = mesh_of(a="Explicit", b="Explicit")
    for spec in (P(None, "a", "b"), P(None, ("a", "b"))):
        spec = NamedSharding(mesh, P(*spec, *(None,) * (5 - len(spec))))
        h_res = jax.ShapeDtypeStruct((3, 8, 2, n, n), jnp.float32, sharding=spec)
        with jax.sharding.use_abstract_mesh(mesh):
            gains = jax.eval_shape(gain_magnitudes, h_res)
        assert gains.composite_forward.shape == (3,)


class LinenModel(nn.Module):
    """`make_first`: the layer's module is made outside of the connection's call."""

    make_first: bool

    @nn.compact
    def __call__(self, x):
        connection = nnx.bridge.ToLinen(ManifoldHyperConnections, args=(C,), kwargs={"n": n})
        return connection(x, nn.Dense(C) if self.make_first else lambda u: nn.Dense(C)(u))


def test_linen_takes_rngs_and_refuses_modules_made_inside():
    """`rngs=`, which the bridge passes to every module; and what would pass `init` and fail in `apply`."""
    model = LinenModel(make_first=True)
    assert model.apply(model.init(jax.random.key(0), X), X).shape == X.shape
    with pytest.raises(ValueError, match=r"Linen modules \(Dense_0\).*make them before"):
        LinenModel(make_first=False).init(jax.random.key(0), X)
