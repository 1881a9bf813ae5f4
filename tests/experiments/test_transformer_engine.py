"""TransformerEngine as a baseline: it gets our parameters in its own order, and computes what we do."""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest

from experiments.kernel_speed import transformer_engine as engine

torch = pytest.importorskip("torch", reason="extra 'parity'")


def test_parameters_in_its_order():
    C, n = 6, engine.N
    torch.manual_seed(0)
    x, phi, bias = torch.randn(5, n, C), torch.randn(n * C, 24), torch.randn(24)
    theirs, their_bias, _ = engine.from_ours(phi, bias, torch.ones(3))
    ours = x.reshape(5, -1) @ phi + bias
    found = x.transpose(1, 2).reshape(5, -1) @ theirs.T + their_bias
    torch.testing.assert_close(found[:, :8], ours[:, :8])
    h_res = found[:, 8:].view(5, n, n).transpose(1, 2)
    torch.testing.assert_close(h_res, ours[:, 8:].view(5, n, n))


def test_without_it_the_error_says_where_it_is_from():
    if importlib.util.find_spec("transformer_engine"):
        pytest.skip("it is installed")
    with pytest.raises(ModuleNotFoundError, match="transformer_engine is not installed"):
        engine.load()


@pytest.mark.gpu_interpreter
@pytest.mark.skipif("TRANSFORMER_ENGINE" not in os.environ, reason="no folder: TRANSFORMER_ENGINE")
@pytest.mark.parametrize("form", ["float32", "bfloat16", "bfloat16 with a buffer"])
def test_gradients_of_a_sublayer(form):
    """Theirs and ours in Triton's interpreter against float64; `pytest -s` shows the errors."""
    path = os.pathsep.join([os.environ["TRANSFORMER_ENGINE"], os.getcwd()])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "NVTE_DISABLE_TRITON_AUTOTUNING": "1",
                   "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}  # fmt: skip
    command = [sys.executable, __file__, form]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


LEAVES = ["new_streams", "h_post", "h_res", "dx", "dphi", "dbias", "dalpha"]
S, B, C = 5, 3, 72


def _mend_interpreter() -> None:
    """Makes Triton 3.6's interpreter compute with bfloat16 as a GPU does.

    It keeps these numbers as 16-bit integers: `tl.dot` multiplies the integers, and a cast from float32 cuts
    bits off. (Our kernels go around both, see `gpu.triton_math`.) Products of float32 it takes exactly, also
    where a GPU would round the factors to TF32.
    """
    import jax.numpy as jnp
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    attributes, cast, dot = interpreter._patch_lang_tensor, builder.cast_impl, builder.create_dot

    def patch(tensor, scope):  # numpy no longer turns an array of one entry into an index
        attributes(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def rounding_cast(self, x, dtype):
        if (x.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, x, dtype)
        return handle(np.asarray(x.data).astype(jnp.bfloat16).view(np.uint16), tl.bfloat16)

    def product(self, a, b, *others):
        def wide(x):
            if x.dtype.scalar != tl.bfloat16:
                return x
            return handle(x.data.view(jnp.bfloat16).astype(np.float32), tl.float32)

        return dot(self, wide(a), wide(b), *others)

    interpreter._patch_lang_tensor = patch
    builder.cast_impl, builder.create_dot = rounding_cast, product


def _numpy(a):
    """Returns an array of ours, streams flat."""
    import jax.numpy as jnp

    if not isinstance(a, torch.Tensor):
        return np.asarray(a)
    a = a.detach()
    if a.shape[2:] == (C, 4):
        a = a.transpose(-1, -2).reshape(S * B, 4 * C)
    return a.float().numpy().astype(jnp.bfloat16) if a.dtype == torch.bfloat16 else a.numpy()


def _in_their_order(parameters) -> tuple:
    return engine.from_ours(*(torch.tensor(np.asarray(a)) for a in parameters))


def _theirs(x, g, parameters, buffer: bool) -> tuple:
    options = {"fused_grad_x_acc_buffer": torch.zeros(x.shape)} if buffer else {}
    arguments = [a.clone().requires_grad_() for a in (x, *engine.from_ours(*parameters))]
    out, h_post, h_res = engine.sublayer(*arguments, **options)
    return out, h_post, h_res, *torch.autograd.grad(out, arguments, g)


def _ours(x, g, parameters) -> tuple:
    import jax
    import jax.numpy as jnp

    import kernels_pallas as kernels

    def sublayer(x, *parameters):
        u, h_post, h_res, x = kernels.read(x, *parameters, n=4, implementation="triton")
        return kernels.post_res(x, u, h_post, h_res, implementation="triton"), h_post, h_res

    results, vjp = jax.vjp(sublayer, *(jnp.asarray(_numpy(a)) for a in (x, *parameters)))
    dx, *d = vjp((jnp.asarray(_numpy(g)), *map(jnp.zeros_like, results[1:])))
    return *results, dx, *_in_their_order(d)


def _truths(x, g, parameters, rounds: bool, as_ours: bool) -> tuple[list, float]:
    """Returns the results in float64, and by what dx may be off where its three parts are bfloat16.

    `rounds`: the layer input and its cotangent are bfloat16 numbers, as F gets and gives them.
    `as_ours`: so are the write's cotangent of the streams, which the read adds to, and the cotangent of the
    projection is a TF32 number.
    """
    from kernels_pallas.testing import oracle

    x, g, *parameters = map(_numpy, (x, g, *parameters))
    wide = np.asarray(x, np.float64)

    def stored(a):
        return oracle.round_bits(a, 8) if rounds else a

    u, h_post, h_res, _ = oracle.read(wide, *parameters, None, 4)
    u = stored(u)
    of_write, du, dh_post, dh_res = oracle.post_res_vjp(wide, u, h_post, h_res, g)
    cotangents = stored(du), dh_post, dh_res, stored(of_write) if as_ours else of_write
    dx, *d = oracle.read_vjp(x if as_ours else wide, *parameters, None, cotangents, 4)
    h_pre, *_ = oracle.mappings(wide, *parameters, 4)
    of_sum, _ = oracle.pre_vjp(wide, h_pre, stored(du))
    norms = sum(map(np.linalg.norm, (of_write, of_sum, dx - of_write - of_sum)))
    new_streams = oracle.post_res(wide, u, h_post, h_res)
    # A part is off by 2^-8 of itself at most, and then the sum of two.
    off = 2 * 2.0**-8 * norms / np.linalg.norm(dx)
    return [new_streams, h_post, h_res, dx, *_in_their_order(d)], off


def _compare(form: str) -> None:
    from kernels_pallas.testing import oracle

    _mend_interpreter()
    bf16, buffer = form.startswith("bfloat16"), form.endswith("buffer")
    torch.manual_seed(0)
    x, g = (torch.randn(S, B, C, 4).to(torch.bfloat16 if bf16 else None) for _ in range(2))
    # TF32 numbers, which phi is in our definition and in their products.
    phi = torch.tensor(oracle.round_tf32(0.1 * torch.randn(4 * C, 24).numpy()))
    inputs = x, g, (phi, torch.randn(24), torch.randn(3))

    limits = dict.fromkeys(LEAVES, oracle.SUMS) | {"dalpha": oracle.CANCELLING}
    if bf16:  # behind the layer input and its cotangent
        limits |= dict.fromkeys(("new_streams", "dx", "dphi", "dbias", "dalpha"), oracle.TIES)
    exact, _ = _truths(*inputs, rounds=False, as_ours=False)
    wrong = []
    for name, found in (("theirs", _theirs(*inputs, buffer)), ("ours", _ours(*inputs))):
        truths, off = _truths(*inputs, rounds=bf16, as_ours=name == "ours")
        allowed = {**limits, "dx": off} if bf16 and name == "theirs" and not buffer else limits
        for leaf, got, truth, plain in zip(LEAVES, found, truths, exact, strict=True):
            truth, plain = np.asarray(truth), np.asarray(plain)
            got = _numpy(got).reshape(truth.shape)
            error = oracle.error(got, truth)
            line = f"{name:6} {leaf:11} {error:.1e} of {allowed[leaf]:.1e}"
            print(f"{line}, without the definition's roundings {oracle.error(got, plain):.1e}")
            wrong += [line] if not error < allowed[leaf] else []
    assert not wrong, wrong


if __name__ == "__main__":
    _compare(sys.argv[1])
