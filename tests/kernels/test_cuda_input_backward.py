"""The backward of a layer input and of the mappings in CUDA, in the emulator, against float64."""

import dataclasses
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed (extra 'parity')", allow_module_level=True)

from kernels_pallas.boundary import cuda_input_backward, triton_layer_input
from kernels_pallas.boundary.contract import ReadStatic
from kernels_pallas.testing import emulate, oracle
from kernels_pallas.testing.case import Case, value_and_cotangents

PACKAGE = pathlib.Path(cuda_input_backward.__file__).parents[1]
HC = "HC"
EPS = 1e-6

pytestmark = [
    pytest.mark.gpu_interpreter,
    pytest.mark.skipif(not emulate.available(), reason="no g++"),
]


def arguments(T, C, form, wide=1.0):
    """Random x, h_pre, weight, d, s, r, bias, alpha, dh_post, dh_res (or of the logits)."""
    rng = np.random.default_rng(T + C)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    k = 16 if form in ("", HC) else int(form)
    s, r = (normal(T, 4, 6), normal(T, 4)) if form == HC else (normal(T, 8 + k), normal(T))
    x, d = (normal(T, columns).astype(jnp.bfloat16) for columns in (4 * C, C))
    gates = wide * normal(8 + k), normal(3), normal(T, 4), normal(T, max(1, k))
    return [x, normal(T, 4), 1 + normal(C), d, wide * s, 0.5 + abs(r), *gates]


def options(form):
    return {"hc": form == HC, "logits": int(form) if form.isdigit() else -1}


def truth(x, pre, weight, d, s, r, bias, alpha, dpost, dres, static, form):
    """The results by name, from the oracle's parts; ds is rounded."""
    (T, C), found = d.shape, {}
    if static.has_norm:
        u, wd = oracle.pre(x, pre), weight * d.astype(np.float64)
        inverse = ((u**2).mean(-1) + static.input_norm_eps) ** -0.5
        found = {"inverse": inverse, "kappa_n": inverse**3 * (wd * u).mean(-1)}
        d, _ = oracle.rms_norm_vjp(u, weight, d, static.input_norm_eps)
    _, dpre = oracle.pre_vjp(x, pre, d)
    if form == HC:
        vjp, more = oracle.hc_mappings_vjp, {}
    elif form:
        vjp, more, dres = oracle.logits_vjp, {}, dres[:, : int(form)]
    else:
        vjp, dres = oracle.coefficients_vjp, dres.reshape(T, 4, 4)
        more = {"num_iterations": static.num_iterations, "sinkhorn_eps": static.sinkhorn_eps}
    ds, dr, dbias, dalpha = vjp(s, r, bias, alpha, dpre, dpost, dres, 4, **more)
    _, dr_pre, _, _ = vjp(s, r, bias, alpha, dpre, 0 * dpost, 0 * dres, 4, **more)
    K = C if form == HC else 4 * C
    found |= {"kappa": (dr - dr_pre) / (r * K), "kappa_pre": dr_pre / (r * K)}
    return found | {"ds": oracle.round_bits(ds, 11), "dbias": dbias, "dalpha": dalpha}


def results(outputs, T, static, form):
    """The results by name. Checks what else `store_fragments` promises of both layouts of ds."""
    left, right, kappa, kappa_pre, sums, norm = outputs
    assert not (left.view(np.uint32) & 0x1FFF).any()  # TF32 numbers
    tiles, pieces = left.shape[:2]
    # Axes: tile, piece, token of 8, pair of columns, column of two, half of the tile.
    ds = left.reshape(tiles, pieces, 8, 4, 2, 2).transpose(0, 5, 2, 1, 3, 4)
    ds = ds.reshape(16 * tiles, 8 * pieces)
    # Axes: tile, piece, column, pair of tokens, half of the tile, term, token of two.
    terms = right.astype(np.float64).reshape(tiles, pieces, 8, 4, 2, 2, 2).sum(5)
    terms = terms.transpose(0, 4, 3, 5, 1, 2).reshape(ds.shape)
    np.testing.assert_allclose(terms, ds, rtol=2.0**-16, atol=1e-37)
    assert not ds[T:].any()
    if form == HC:
        ds = ds[:T].reshape(T, 4, 8)
        ds, rest = ds[..., :6], ds[..., 6:]
    else:
        columns = sums.shape[0] - 3
        ds, rest = ds[:T, :columns], ds[:T, columns:]
    assert not rest.any()
    total = sums.astype(np.float64).sum(1)
    found = {"kappa": kappa, "kappa_pre": kappa_pre, "ds": ds}
    if static.has_norm:
        assert not norm[:, 2:].any()
        found |= {"inverse": norm[:, 0], "kappa_n": norm[:, 1]}
    return found | {"dbias": total[:-3], "dalpha": total[-3:]}


def emulated(launch, args, T):
    """The outputs, which are the same bits in three orders of threads."""
    first, *others = (launch.emulate(*args, T, seed=seed) for seed in (0, 1, 2))
    for other in others:
        for a, b in zip(first, other, strict=True):
            np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))
    return first


LIMITS = {"ds": oracle.TIES, "dalpha": oracle.CANCELLING}


# T, C, what follows the gates, norm, tokens of a program, Sinkhorn-Knopp's iterations and eps.
@pytest.mark.parametrize(
    ("T", "C", "form", "norm", "tokens", "num_iterations", "eps"),
    [
        (1, 64, "", EPS, 16, 20, 0.0),
        (37, 512, "", 0.4, 32, 20, 0.0),
        (300, 192, "", None, 32, 20, 0.0),
        (16, 1344, "", EPS, 16, 1, 0.0),
        (37, 64, "", None, 32, 40, 0.2),
        (300, 192, HC, 0.4, 32, 1, 0.0),
        (37, 576, HC, None, 16, 1, 0.0),
        (37, 128, "16", EPS, 32, 1, 0.0),
        (21, 320, "5", None, 16, 1, 0.0),
        (16, 64, "0", None, 32, 1, 0.0),
    ],
)
def test_results_are_those_of_the_definition(T, C, form, norm, tokens, num_iterations, eps):
    static = ReadStatic(4, num_iterations, EPS, norm, eps)
    launch = cuda_input_backward.backward_launch(T, C, static, tokens=tokens, **options(form))
    args = arguments(T, C, form)
    found = results(emulated(launch, args, T), T, static, form)
    right = truth(*args, static, form)
    assert found.keys() == right.keys()
    for name, value in right.items():
        error = oracle.error(found[name].reshape(value.shape), value) if value.size else 0
        assert error < LIMITS.get(name, oracle.SUMS), name


@pytest.mark.parametrize(("form", "norm"), [("", EPS), ("", None), (HC, 0.4), ("5", None)])
def test_triton_gives_the_same(form, norm):
    """Its launch, for wide streams, has h_pre's sums in an array of their own."""
    T, C, static = 5, 128, ReadStatic(4, 4, EPS, norm, 0.2)
    launch = triton_layer_input.backward_launch(
        T, C, jnp.dtype(jnp.bfloat16), static, **options(form)
    )
    args = arguments(T, C, form)
    *most, sums, of_pre, norms = map(np.array, launch(*args, T))
    most[0], most[1] = (np.where(np.isnan(x.astype(np.float32)), 0, x) for x in most[:2])
    sums = sums.sum(1, keepdims=True)
    rows = [0, 1, 2, 3, len(sums) - 3]
    sums[rows] = of_pre.sum(1, keepdims=True)
    found = results((*most, sums, norms), T, static, form)
    for name, value in truth(*args, static, form).items():
        error = oracle.error(found[name].reshape(value.shape), value)
        assert error < LIMITS.get(name, oracle.SUMS), name


def hard_matrices():
    """Logits of matrices with hardly any support, of sizes whose exponentials underflow or do not."""
    rng = np.random.default_rng(0)
    found = []
    for size in (20, 60, 85, 90, 104, 300):
        block = np.zeros((2, 4, 4))
        block[0, :3, 1:] = block[1, :2, 1:] = -size  # three rows, or two, that need one column
        triangle = np.tril(np.full((1, 4, 4), -size), -1)
        sparse = -size * (rng.random((20, 4, 4)) < 0.5)
        drawn = size * rng.standard_normal((20, 4, 4))
        noise = rng.standard_normal((2, 4, 4))
        found += [block, block.swapaxes(1, 2), -block, block + noise, triangle, sparse, drawn]
    return np.concatenate(found).astype(np.float32)


@pytest.mark.parametrize(
    ("num_iterations", "eps"),
    [(20, 0.0), (40, 0.0), pytest.param(40, 1e-30, marks=pytest.mark.slow)],
)
def test_sinkhorn_of_matrices_without_support(num_iterations, eps):
    """Factors of rows and columns grow with the iterations; scaling the matrix itself underflows for some."""
    logits = hard_matrices()
    huge = [np.float32(size) * logits[:66] / 20 for size in (1e10, 1e30)]
    logits = np.concatenate([logits, *huge])
    T = len(logits)
    static = ReadStatic(4, num_iterations, EPS, None, eps)
    launch = cuda_input_backward.backward_launch(T, 64, static)
    args = arguments(T, 64, "")
    args[4][:, 8:] = logits.reshape(T, 16)
    args[5][:], args[6][:], args[7][:] = 1, 0, 1  # r, bias, alpha: s are the logits
    found = results(launch.emulate(*args, T), T, static, "")
    assert all(np.isfinite(value).all() for value in found.values())
    usual = T - sum(map(len, huge))
    right = oracle.sinkhorn_vjp(
        logits[:usual], args[9][:usual].reshape(-1, 4, 4), num_iterations, eps
    )
    error = oracle.error(found["ds"][:usual, 8:], oracle.round_bits(right.reshape(usual, 16), 11))
    assert error < oracle.TIES


@pytest.mark.parametrize("barrier", ["__syncthreads();", "__syncwarp();"])
def test_a_missing_barrier_is_seen(tmp_path, barrier):
    """The tests above can fail: without a barrier of the kernel's body results are wrong."""
    source = (PACKAGE / "boundary/input_backward.cu").read_text()
    assert barrier in source
    path = tmp_path / "input_backward.cu"
    path.write_text(source.replace(barrier, ""))
    T, C = 37, 128
    launch = cuda_input_backward.backward_launch(
        T, C, ReadStatic(4, 1, EPS, EPS), tokens=32, logits=16
    )
    args = arguments(T, C, "16")
    right = launch.emulate(*args, T)
    wrong = dataclasses.replace(launch, source=str(path)).emulate(*args, T, seed=1)
    assert not np.array_equal(right[0].view(np.uint8), wrong[0].view(np.uint8))


@pytest.mark.parametrize("most", [64, 128])
def test_wide_streams_take_triton(most, monkeypatch):
    """Traced, not run."""
    launched = []
    for module, kind in ((cuda_input_backward, "cuda"), (triton_layer_input, "triton")):
        make = module.backward_launch

        def recording(*args, make=make, kind=kind, **kwargs):
            launched.append(kind)
            return make(*args, **kwargs)

        monkeypatch.setattr(module, "backward_launch", recording)
    monkeypatch.setattr(cuda_input_backward, "MOST_COLUMNS", most)
    case = Case("boundary", 5, 128, 4, jnp.bfloat16)
    jax.eval_shape(value_and_cotangents(case.call("cuda")), *case.draw())
    assert launched == ["cuda" if most == 128 else "triton"]
