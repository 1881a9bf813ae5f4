"""Gains of any model: whatever lies between it and its connections, all sublayers come out in order."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from configs import default
from mhc_jax import (
    HyperConnections,
    Identity,
    KroneckerMixture,
    ManifoldHyperConnections,
    Pending,
    Residual,
    analysis,
    expand,
    gains,
)
from mhc_jax.analysis import measure, static
from mhc_jax.analysis.collect import collected
from mhc_jax.config import from_dict
from mhc_jax.gains import files, sums
from mhc_jax.train_step import model_graph
from mhc_jax.transformer import Transformer

C, N, L = 8, 2, 2
X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, C)), jnp.float32)


def perturbed(tree):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + 0.3 * jnp.asarray(rng.normal(size=x.shape), x.dtype), tree)


class Sublayer(nnx.Module):
    def __init__(self, index):
        # Neither symmetric nor stochastic once perturbed: another order changes the composites.
        self.connection = HyperConnections(C, N, sublayer_index=index, implementation="xla")
        self.weight = nnx.Param(jnp.zeros((C, C)))

    def layer(self, x):
        return jnp.tanh(x @ self.weight[...])

    def __call__(self, streams):
        return self.connection(streams, self.layer)


GRAPH, VARIABLES = nnx.split(nnx.vmap(Sublayer)(jnp.arange(L)))
VARIABLES = perturbed(VARIABLES)


def sublayers():
    return [nnx.merge(GRAPH, jax.tree.map(lambda x, k=k: x[k], VARIABLES)) for k in range(L)]


class Loop(nnx.Module):
    def __init__(self, run):
        self.run, self.sublayers = run, nnx.List(sublayers())

    def __call__(self, x):
        return self.run(self.sublayers, expand(x, N))


class Stack(nnx.Module):
    def __init__(self, run):
        self.run, self.stack = run, nnx.merge(GRAPH, VARIABLES)

    def __call__(self, x):
        return self.run(self.stack, expand(x, N))


def loop(parts, streams):
    for part in parts:
        streams = part(streams)
    return streams


def pre_and_post(parts, streams):
    for part in parts:
        layer_input, mappings = part.connection.pre(streams)
        streams = part.connection.post(streams, part.layer(layer_input), mappings)
    return streams


def boundaries(parts, streams):
    pending = Pending(streams, None, None)
    for part in parts:
        streams, layer_input, mappings = part.connection.boundary(pending)
        pending = Pending(streams, part.layer(layer_input), mappings)
    return part.connection.post(*pending)


def loop_of_remat(parts, streams):
    for part in parts:
        streams = nnx.remat(lambda part, streams: part(streams))(part, streams)
    return streams


def loop_of_vmap(parts, streams):  # over the length
    for part in parts:
        each = nnx.vmap(lambda part, s: part(s), in_axes=(None, 1), out_axes=1)
        streams = each(part, streams)
    return streams


def scan(stack, streams, step=lambda part, streams: part(streams)):
    return nnx.scan(step, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(stack, streams)


def scan_of_remat(stack, streams):
    return scan(stack, streams, nnx.remat(lambda part, streams: part(streams)))


def scan_of_vmap(stack, streams):
    return scan(stack, streams, nnx.vmap(lambda part, s: part(s), in_axes=(None, 0)))


def vmap_of_scan(stack, streams):
    return nnx.vmap(lambda stack, s: scan(stack, s), in_axes=(None, 0))(stack, streams)


def lax_scan(stack, streams):
    graph, variables = nnx.split(stack)
    step = lambda s, one: (nnx.merge(graph, one)(s), None)  # noqa: E731
    return jax.lax.scan(step, streams, variables)[0]


def lax_scan_in_reverse(stack, streams):
    graph, variables = nnx.split(stack)
    variables = jax.tree.map(lambda x: x[::-1], variables)
    step = lambda s, one: (nnx.merge(graph, one)(s), None)  # noqa: E731
    return jax.lax.scan(step, streams, variables, reverse=True)[0]


def jitted(parts, streams):
    return nnx.jit(loop)(parts, streams)


def switched(parts, streams):
    return jax.lax.cond(
        streams.sum() > 1e9, lambda s: loop(parts[::-1], s), lambda s: loop(parts, s), streams
    )


@pytest.fixture(scope="module")
def expected():
    """h_res [L, 2, 5, N, N] by hand, and the cosines."""
    streams, h_res, cosine = expand(X, N), [], []
    for part in sublayers():
        h_res.append(part.connection.pre(streams)[1].h_res)
        cosine.append(gains.stream_cosine(streams, N))
        streams = part(streams)
    assert np.abs(np.diff(h_res, axis=0)).max() > 0.1
    return jnp.stack(h_res), jnp.stack(cosine)


@pytest.mark.parametrize(
    ("kind", "run"),
    [(Loop, run) for run in (loop, pre_and_post, boundaries, loop_of_remat, loop_of_vmap, jitted, switched)]
    + [(Stack, run) for run in (scan, scan_of_remat, scan_of_vmap, vmap_of_scan, lax_scan,
                                lax_scan_in_reverse)],
)  # fmt: skip
def test_every_sublayer_comes_out_in_order(kind, run, expected):
    model = kind(run)
    before = jax.tree.leaves(nnx.state(model))
    found = collected(measure._forward(model, None))(X)
    h_res = found.h_res.swapaxes(1, 2) if run is loop_of_vmap else found.h_res
    np.testing.assert_allclose(h_res, expected[0], atol=1e-5)
    np.testing.assert_allclose(found.stream_cosine, expected[1], atol=1e-5)
    # The model is as it was: nothing traced is left in it.
    after = jax.tree.leaves(nnx.state(model))
    assert all(a is b for a, b in zip(before, after, strict=True))


def test_gains_of_a_model_a_method_and_a_function(expected):
    model, parts = Loop(loop), sublayers()
    want = gains.gain_magnitudes(expected[0])
    traced = jax.jit(lambda x: loop(parts, expand(x, N)))
    traced(X)  # before anybody collects
    for found in (
        analysis.gains_of(model, X),
        analysis.gains_of(model.__call__, {"x": X}),
        analysis.gains_of(lambda x, flag: traced(x) if flag else None, (X, True)),
    ):
        np.testing.assert_allclose(found.composite_backward, want.composite_backward, rtol=1e-5)
        np.testing.assert_allclose(found.stream_cosine, expected[1], atol=1e-5)


def test_axes_of_vmap_come_first_also_where_h_res_does_not_depend_on_them():
    connection = ManifoldHyperConnections(C, N, manifold=Identity(), implementation="xla")
    streams = jnp.asarray(np.random.default_rng(5).normal(size=(5, N * C, 3)), jnp.float32)
    found = collected(jax.vmap(lambda s: connection(s, jnp.sin), in_axes=2))(streams)
    np.testing.assert_array_equal(found.h_res, np.tile(np.eye(N), (1, 3, 5, 1, 1)))
    want = gains.stream_cosine(jnp.moveaxis(streams, 2, 0), N)
    np.testing.assert_allclose(found.stream_cosine[0], want, rtol=1e-5)


def test_residual_connections_have_gain_one():
    connections = [Residual(), Residual()]

    def model(x):
        for connection in connections:
            x = connection(x, jnp.sin)
        return x

    found = analysis.gains_of(model, X)
    for name in gains.GainMagnitudes._fields[:4]:
        np.testing.assert_array_equal(getattr(found, name), [1, 1])
    np.testing.assert_array_equal(found.stream_cosine, [1, 1])
    np.testing.assert_array_equal(static._mappings(connections), np.ones((2, 1, 1)))


def test_models_without_connections_and_what_cannot_be_collected():
    part = sublayers()[0]
    bad = [
        (lambda x: x, ValueError, "no connection of mhc_jax ran.* go to gain_magnitudes"),
        (lambda x: jax.lax.while_loop(lambda s: s.sum() < 0, part, expand(x, N)), NotImplementedError,
         r"lax\.while_loop"),
        (lambda x: jax.lax.cond(x.sum() > 0, part, lambda s: s, expand(x, N)), NotImplementedError,
         "every branch"),
        (lambda x: part(expand(x, N)) + HyperConnections(C, N)(expand(x[0], N), jnp.sin).sum(), ValueError,
         "different shapes"),
    ]  # fmt: skip
    for model, error, message in bad:
        with pytest.raises(error, match=message):
            analysis.gains_of(model, X)
    graph, stack = nnx.split(jax.tree.map(lambda *leaves: jnp.stack(leaves), *sublayers()))

    def scanned(x):
        step = lambda s, part: (nnx.merge(graph, part)(s), None)  # noqa: E731
        return jax.lax.scan(step, expand(x, N), stack)[0]

    for model in (Loop(loop), scanned):  # no tokens
        with pytest.raises(ValueError, match="and not empty"):
            analysis.gains_of(model, X[:0])
    with pytest.raises(ValueError, match="give them, as in gains_of"):
        analysis.gains_of(linen.Dense(3), X)
    with pytest.raises(ValueError, match="a workdir goes to gains_of_run"):
        analysis.gains_of("runs/mhc", X)


def test_nothing_is_left_in_a_program_where_nobody_collects(monkeypatch):
    """The jaxpr of forward and backward is the one of connections that do not report."""
    from mhc_jax.analysis import collect

    def programs():
        model = ManifoldHyperConnections(C, N, implementation="xla")
        graph, variables = nnx.split(model)
        streams = expand(X, N)

        def loss(variables, streams):
            connection = nnx.merge(graph, variables)
            pending = Pending(*connection.read(streams)[:2], connection.pre(streams)[1])
            streams, layer_input, _ = connection.boundary(pending)
            return (Residual()(streams, jnp.sin).sum() + layer_input.sum()).astype(jnp.float32)

        return str(jax.make_jaxpr(jax.value_and_grad(loss))(variables, streams))

    plain = programs()
    monkeypatch.setattr(collect, "report", lambda connection, h_res, streams: h_res)
    assert programs() == plain


def test_capture_finds_intermediates(expected):
    captured = nnx.capture(Loop(loop), nnx.Intermediate)(X)[1]
    for index in range(L):
        (h_res,) = captured["sublayers"][index]["connection"]["h_res"].get_value()
        np.testing.assert_allclose(h_res, expected[0][index], atol=1e-5)
    captured = nnx.capture(Stack(scan), nnx.Intermediate)(X)[1]
    (h_res,) = captured["stack"]["connection"]["h_res"].get_value()
    np.testing.assert_allclose(h_res, expected[0], atol=1e-5)
    captured = nnx.capture(Residual(), nnx.Intermediate)(X, jnp.sin)[1]
    np.testing.assert_array_equal(captured["h_res"].get_value()[0], np.ones((2, 5, 1, 1)))


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, streams, _):
        make = {"n": N, "implementation": "xla"}
        connection = nnx.bridge.ToLinen(HyperConnections, args=(C,), kwargs=make, skip_rng=True)
        layer_input, mappings = connection(streams, nnx_method="pre")
        return connection(streams, jnp.tanh(layer_input), mappings, nnx_method="post"), None


class LinenModel(linen.Module):
    axes: tuple[str, ...] = ()

    @linen.compact
    def __call__(self, x):
        streams = expand(x, N)
        if not self.axes:
            for _ in range(L):
                streams, _ = LinenBlock()(streams, None)
            return streams
        axes = dict.fromkeys(self.axes, 0)
        block = linen.scan(
            linen.remat(LinenBlock), variable_axes=axes, split_rngs={"params": True}, length=L
        )
        return block()(streams, None)[0]


@pytest.mark.parametrize("axes", [(), ("params",), ("params", "intermediates")])
def test_linen(axes):
    model = LinenModel(axes)
    variables = model.init(jax.random.key(0), X)
    assert set(variables) == {"params"}
    variables = perturbed(variables)
    found = analysis.gains_of(model, X, variables=variables)
    assert found.single_forward.shape == (L,)
    if not axes:
        bound = analysis.gains_of(model.bind(variables), X)
        np.testing.assert_array_equal(found.composite_forward, bound.composite_forward)
    assert isinstance(model.apply(variables, X), jax.Array)
    stored = jax.tree.leaves(model.apply(variables, X, mutable=["intermediates"])[1])
    if axes != ("params",):  # the model's own scan throws the collection away
        h_res = jnp.concatenate([x.reshape(-1, *X.shape[:2], N, N) for x in stored])
        want = gains.gain_magnitudes(h_res)
        np.testing.assert_allclose(found.composite_backward, want.composite_backward, rtol=1e-5)
    assert static._mappings(variables["params"]).shape == (L, N, N)


def small(**fields):
    config = default.get_config()
    config.model.update(
        num_blocks=3, width=C, n=N, num_heads=2, ffn_width=8, vocab_size=16, dtype="float32"
    )
    config.model.update(fields)
    return from_dict(config).model


MOE = dict(num_experts=2, experts_per_token=1, shared_experts=1, expert_width=8)


def test_the_decoder():
    """Recompute blocks, leading blocks; and its static gains from the module and from parameters."""
    config = small(**MOE, connection="hc", remat="mhc", recompute_block="2")
    shapes = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), nnx.to_pure_dict(nnx.state(shapes)))
    variables = perturbed(zeros)
    model = nnx.merge(model_graph(config), variables)

    @jax.jit
    def both(tokens):
        return collected(measure._forward(model, None))(tokens), model.analyse(tokens)

    found, want = both(jnp.arange(6)[None])
    np.testing.assert_allclose(found.h_res, want.h_res, atol=1e-4)
    np.testing.assert_allclose(found.stream_cosine, want.stream_cosine, atol=1e-4)

    stack = variables["blocks"]
    blocks = [variables["leading"][0], *(jax.tree.map(lambda x, k=k: x[k], stack) for k in (0, 1))]
    order = [b[f"{name}_connection"] for b in blocks for name in ("attention", "ffn")]
    by_hand = static._mappings(order)
    assert np.abs(np.diff(by_hand, axis=0)).max((1, 2)).min() > 1e-5
    for parameters in (model, variables):
        np.testing.assert_allclose(static._mappings(parameters), by_hand, atol=1e-6)


def test_static_gains_are_the_projected_bias():
    n = 3
    logits = np.random.default_rng(2).normal(size=(2, n, n))
    m = np.exp(logits)
    for _ in range(20):
        m /= m.sum(-2, keepdims=True)
        m /= m.sum(-1, keepdims=True)
    bias = np.concatenate([np.zeros((2, 2 * n)), logits.reshape(2, -1)], axis=-1)
    phi, alpha = np.zeros((2, n * C, bias.shape[-1])), np.zeros((2, 3))
    parameters = {"a": {"phi": phi, "bias": bias, "alpha": alpha}}
    np.testing.assert_allclose(static._mappings(parameters), m, atol=1e-5)
    found = analysis.static_gains(Loop(loop))
    by_hand = [part.connection.bias[2 * N :].reshape(N, N) for part in sublayers()]
    np.testing.assert_allclose(found.matrix_composite[-1], by_hand[1] @ by_hand[0], atol=1e-5)
    # HC's are the bias itself.
    hc = [{"theta": phi, "bias": b, "alpha": alpha[0]} for b in bias]
    np.testing.assert_allclose(static._mappings(hc), logits, rtol=1e-6)
    # A read-out is no connection; numbers in names count as numbers.
    head = {"phi": np.zeros((n * C, n)), "bias": np.zeros(n), "alpha": np.ones(1)}
    named = {f"layer_{k}": {"c": hc[k % 2]} for k in (10, 9)} | {"readout": head}
    np.testing.assert_allclose(static._mappings(named), logits[[1, 0]], rtol=1e-6)
    # Without logits for h_res it is the identity, which n has to say.
    parameters = {"phi": phi[0], "bias": np.zeros(8), "alpha": alpha[0]}
    np.testing.assert_array_equal(static._mappings(parameters, n=4)[0], np.eye(4))
    np.testing.assert_allclose(static._mappings(parameters), np.full((1, 2, 2), 0.5))
    identity = ManifoldHyperConnections(C, 4, manifold=Identity())
    np.testing.assert_array_equal(static._mappings(identity)[0], np.eye(4))
    off = HyperConnections(C, 4, use_res=False)
    off.bias[...] = jnp.arange(24.0)
    np.testing.assert_array_equal(static._mappings(off)[0], np.eye(4))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"dense": {"kernel": np.ones((2, 2))}}, "no parameters of connections"),
        (
            {"phi": 0, "bias": np.ones(9), "alpha": np.ones(3)},
            r"\(9,\) is not that of n\*n \+ 2n logits: give n, .* and manifold, if",
        ),
        (
            [{"phi": 0, "bias": np.ones(m), "alpha": np.ones(3)} for m in (8, 15)],
            "different numbers",
        ),
        ("runs/mhc", "takes an NNX model, nested dicts"),
        (3.0, "got float"),
    ],
)
def test_static_gains_of_something_else(parameters, message):
    with pytest.raises(ValueError, match=message):
        analysis.static_gains(parameters)


def test_static_gains_of_another_manifold_ask_for_it():
    parameters = {"phi": 0, "bias": np.zeros(22), "alpha": np.ones(3)}  # KromHC, n = 8
    message = r"n=8: its last axis must be 2n \+ 64 with Birkhoff\(.*\): give another n or manifold"
    with pytest.raises(ValueError, match=message):
        analysis.static_gains(parameters, n=8)
    found = analysis.static_gains(parameters, n=8, manifold=KroneckerMixture())
    np.testing.assert_allclose(found.matrix_single, np.full((1, 8, 8), 1 / 8), rtol=1e-6)


H = np.random.default_rng(3).normal(size=(3, 4, 5, 2, 2)).astype(np.float32)


@pytest.mark.parametrize(
    "convert",
    [
        lambda h: h,
        jnp.asarray,
        lambda h: h.astype(np.float64),
        lambda h: h.tolist(),
        lambda h: [jnp.asarray(x) for x in h],
        lambda h: tuple(h.reshape(3, 20, 2, 2)),
    ],
)
def test_mappings_of_any_kind(convert):
    want = gains.gain_magnitudes(H)
    found = analysis.gain_magnitudes(convert(H))
    for name in gains.GainMagnitudes._fields[:-1]:
        np.testing.assert_allclose(
            getattr(found, name), getattr(want, name), rtol=1e-6, err_msg=name
        )
    one = analysis.gain_magnitudes(H[:, 0, 0])  # a single token
    np.testing.assert_allclose(one.single_forward, np.abs(H[:, 0, 0].sum(-1)).max(-1), rtol=1e-6)


@pytest.mark.parity
def test_mappings_of_torch():
    import torch

    want = gains.gain_magnitudes(H)
    for tensor in (torch.tensor(H), torch.tensor(H, requires_grad=True), list(torch.tensor(H))):
        found = analysis.gain_magnitudes(tensor)
        np.testing.assert_allclose(found.composite_forward, want.composite_forward, rtol=1e-6)
    half = torch.tensor(H, dtype=torch.bfloat16, requires_grad=True)
    want = gains.gain_magnitudes(jnp.asarray(H, jnp.bfloat16))
    found = analysis.gain_magnitudes(half)
    np.testing.assert_array_equal(found.composite_forward, want.composite_forward)
    with pytest.raises(ValueError, match="complex64"):
        analysis.gain_magnitudes(torch.zeros(1, 2, 2, dtype=torch.complex64))


@pytest.mark.parametrize(
    ("h_res", "message"),
    [
        ([[1.0, 2.0], [3.0, 4.0]], r"\(2, 2\)"),
        ([np.eye(2), np.eye(3)], r"different shapes: \[\(2, 2\), \(3, 3\)\]"),
        (None, "real numbers, got object"),
        ("text", "real numbers"),
        (np.ones((1, 2, 2), complex), "complex128"),
        ([], r"\(0,\)"),
    ],
)
def test_what_is_no_mapping(h_res, message):
    with pytest.raises(ValueError, match=message) as error:
        analysis.gain_magnitudes(h_res)
    assert "\n" not in str(error.value)


def test_long_sequences_are_analysed_in_parts(monkeypatch):
    """The same numbers, also where composites leave float32 and tokens differ in sign."""
    h = 3e6 * np.random.default_rng(4).normal(size=(9, 23, 2, 2)).astype(np.float32)
    h[:, ::3] *= 1e-6
    whole = jax.jit(lambda h: gains.finish(sums.gain_sums(h)))(h)
    monkeypatch.setattr(sums, "_CHUNK", 9 * 5 * 4)
    text = str(jax.make_jaxpr(sums.gain_sums)(h))
    assert "9,5,2,2" in text.replace(" ", "")
    parts = jax.jit(lambda h: gains.finish(sums.gain_sums(h)))(h)
    assert np.isinf(parts.composite_forward[-1])
    for found in (parts, gains.gain_magnitudes(h)):  # of one device, of the host
        for name, want in whole._asdict().items():
            got, want = np.asarray(getattr(found, name)), np.asarray(want)
            finite = np.isfinite(want)
            np.testing.assert_array_equal(got[~finite], want[~finite], err_msg=name)
            size = np.abs(want[finite]).max() if finite.any() else 0
            np.testing.assert_allclose(
                got[finite], want[finite], rtol=1e-4, atol=1e-6 * size, err_msg=name
            )


def test_both_definitions():
    """+M for one token and -M for another: every gain is M's, that of the mean matrix is 0."""
    m = H[:, 0, :1]
    both = analysis.gain_magnitudes(np.concatenate([m, -m], axis=1))
    np.testing.assert_allclose(both.single_forward, np.abs(m.sum(-1)).max(-1)[:, 0], rtol=1e-6)
    np.testing.assert_array_equal(both.of_mean_matrices().single_forward, 0)
    mean = analysis.gain_magnitudes(H).of_mean_matrices()
    matrices = H.reshape(3, 20, 2, 2).mean(1)
    np.testing.assert_allclose(mean.single_backward, np.abs(matrices.sum(1)).max(-1), rtol=1e-5)
    flat = H.reshape(3, 20, 2, 2).astype(float)
    head, tail = (flat[1] @ flat[0]).mean(0), (flat[2] @ flat[1]).mean(0)
    np.testing.assert_allclose(mean.composite_forward[1], np.abs(head.sum(1)).max(), rtol=1e-4)
    np.testing.assert_allclose(mean.composite_backward[1], np.abs(tail.sum(0)).max(), rtol=1e-4)


def write_run(folder, connection, num_blocks=2):
    folder.mkdir()
    model = {"connection": connection, "num_blocks": num_blocks}
    (folder / "config.json").write_text(json.dumps({"model": model}))
    return folder


def test_gains_of_a_run(tmp_path):
    residual = write_run(tmp_path / "residual", "residual", 3)
    found = analysis.gains_of_run(residual)
    np.testing.assert_array_equal(found.composite_backward, np.ones(6))
    run = write_run(tmp_path / "mhc", "mhc")
    with pytest.raises(ValueError, match=r"mhc/gains has no step_\*\.npz"):
        analysis.gains_of_run(run)
    stored = gains.gain_magnitudes(H)
    for step in (5, 10):
        gains.save(
            run / f"gains/step_{step:08d}.npz",
            stored._replace(row_entropy=step * H[:, 0, 0, 0, 0]),
            step,
        )
    np.testing.assert_array_equal(analysis.gains_of_run(run).row_entropy, 10 * H[:, 0, 0, 0, 0])
    np.testing.assert_array_equal(
        analysis.gains_of_run(str(run), step=5).row_entropy, 5 * H[:, 0, 0, 0, 0]
    )
    with pytest.raises(ValueError, match=r"no step 7: there are \[5, 10\]"):
        analysis.gains_of_run(run, step=7)
    torn = run / "gains/step_00000020.npz"
    torn.write_bytes((run / "gains/step_00000010.npz").read_bytes()[:900])
    with pytest.raises(ValueError, match=r"step_00000020\.npz is no file of gains"):
        analysis.gains_of_run(run)
    with pytest.raises(FileNotFoundError, match="nothing is not a workdir"):
        analysis.gains_of_run(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"^gs:// names no bucket: give gs://bucket/folder$"):
        analysis.gains_of_run("gs://")
    (run / "config.json").write_text('{"model": {"conn')
    with pytest.raises(ValueError, match=r"mhc/config\.json is no configuration"):
        analysis.gains_of_run(run)


def test_gains_that_were_stored_without_the_later_fields(tmp_path):
    found = gains.gain_magnitudes(H)
    old = {k: np.asarray(v) for k, v in found._asdict().items() if k not in files._LATER_FIELDS}
    np.savez(tmp_path / "step_00000003.npz", step=np.int64(3), **old)
    loaded, step = gains.load(tmp_path / "step_00000003.npz")
    assert step == 3
    np.testing.assert_array_equal(loaded.single_forward, found.single_forward)
    assert loaded.matrix_std.shape == (3, 2, 2)
    assert np.isnan(loaded.matrix_std).all()


def test_a_module_from_outside_under_a_transform_of_flax():
    class Model(nnx.Module):
        def __init__(self):
            self.connection = ManifoldHyperConnections(8, n=2)

        def __call__(self, x):
            return nnx.jit(lambda connection, x: connection(x, jnp.tanh))(self.connection, x)

    model, x = Model(), jnp.ones((1, 3, 16))
    assert analysis.gains_of(model, x).composite_forward.shape == (1,)
    with pytest.raises(ValueError, match=r"give the module itself, gains_of\(model, inputs\)"):
        analysis.gains_of(lambda x: model(x), x)
