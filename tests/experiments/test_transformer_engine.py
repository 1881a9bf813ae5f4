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
def test_its_sublayer_is_ours():
    """In Triton's interpreter, which multiplies bfloat16 wrongly: float32 streams."""
    path = os.pathsep.join([os.environ["TRANSFORMER_ENGINE"], os.getcwd()])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "NVTE_DISABLE_TRITON_AUTOTUNING": "1",
                   "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def _compare() -> None:
    import jax
    import jax.numpy as jnp
    from triton.runtime import interpreter

    import kernels_pallas as kernels

    before = interpreter._patch_lang_tensor

    def patched(tensor, scope):  # numpy no longer turns an array of one entry into an index
        before(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched
    torch.manual_seed(0)
    S, B, C = 5, 3, 64
    x, g = torch.randn(S, B, C, 4), torch.randn(S, B, C, 4)
    ours = 0.1 * torch.randn(4 * C, 24), torch.randn(24), torch.randn(3)
    theirs = [a.clone().requires_grad_() for a in (x, *engine.from_ours(*ours))]
    out, h_post, h_res = engine.sublayer(*theirs)
    found = out, h_post, h_res, *torch.autograd.grad(out, theirs, g)

    def flat(a):
        return a.transpose(-1, -2).reshape(S * B, 4 * C)

    def sublayer(x, *parameters):
        u, h_post, h_res = kernels.read(x, *parameters, n=4, implementation="xla")[:3]
        return kernels.post_res(x, u, h_post, h_res, implementation="xla"), h_post, h_res

    arguments = [jnp.asarray(a.numpy()) for a in (flat(x), *ours)]
    results, vjp = jax.vjp(sublayer, *arguments)
    zeros = [jnp.zeros_like(a) for a in results[1:]]
    dx, *d_parameters = vjp((jnp.asarray(flat(g).numpy()), *zeros))
    d_parameters = engine.from_ours(*(torch.tensor(np.asarray(a)) for a in d_parameters))
    for got, want in zip(found, (*results, dx, *d_parameters), strict=True):
        got = got.detach() if got.shape[2:] != (C, 4) else flat(got.detach())
        got, want = (np.asarray(a, np.float64).ravel() for a in (got, want))
        # Ours rounds phi to TF32.
        assert np.linalg.norm(got - want) < 2e-3 * np.linalg.norm(want)


if __name__ == "__main__":
    _compare()
