"""Names of implementations: what None takes, what a name means, and what is said where it cannot run."""

import logging

import jax
import jax.numpy as jnp
import pytest

import kernels_pallas as kp
from kernels_pallas import dispatch
from kernels_pallas.sharding import on_device, token_sharding

BF16 = jnp.bfloat16
X, H = jnp.ones((3, 4 * 16), BF16), jnp.ones((3, 4))


@pytest.mark.parametrize("op", dispatch.OPS)
def test_every_operation_has_a_backend_of_every_name_but_cuda(op):
    names = {"xla", "pallas", "triton"} | (
        {"cuda"} if op.removeprefix("hc_").startswith(("read", "boundary", "look_ahead")) else set()
    )
    assert set(dispatch.implementations(op)) == names


def test_names_by_operation():
    assert set(dispatch.by_op(None).values()) == {None}
    assert set(dispatch.by_op("xla").values()) == {"xla"}
    names = dispatch.by_op("boundary=cuda, sinkhorn = triton")
    assert {op: name for op, name in names.items() if name} == {
        "boundary": "cuda",
        "sinkhorn": "triton",
    }
    # The name of one operation is nothing to another, here on a CPU.
    assert kp.pre(X, H, implementation="sinkhorn=pallas").shape == (3, 16)
    with pytest.raises(NotImplementedError, match="pre: implementation='pallas' needs a TPU"):
        kp.pre(X, H, implementation="pre=pallas")


@pytest.mark.parametrize(
    ("implementation", "message"),
    [
        ("rocm", "'rocm' is unknown: use None, one of xla, pallas, triton, cuda, or"),
        ("", "is unknown: use None"),
        (3, "implementation=3 is unknown"),
        ("read=cuda,post=xla", "'post' is no operation, use projection, coefficients"),
        ("read=rocm", "'rocm' is unknown, use xla"),
        ("read=xla,read=xla", "names read twice"),
        ("pre=cuda", "pre has no 'cuda' kernel, it has xla, pallas, triton"),
    ],
)
def test_bad_names_say_what_there_is(implementation, message):
    for check in (dispatch.check_model, dispatch.by_op):
        with pytest.raises(ValueError, match=message):
            check(implementation)
    with pytest.raises(ValueError, match=message):
        kp.pre(X, H, implementation=implementation)


def test_cuda_alone_is_no_name_for_a_model():
    with pytest.raises(
        ValueError, match=r"post_res have no such kernel.*'read=cuda,boundary=cuda,read_logits="
    ):
        dispatch.check_model("cuda")
    dispatch.check_model("read=cuda,boundary=cuda")


def test_an_operation_without_cuda_raises_by_name():
    for call in (
        lambda: kp.pre(X, H, implementation="cuda"),
        lambda: kp.sinkhorn(jnp.ones((4, 4)), implementation="cuda"),
    ):
        with pytest.raises(
            NotImplementedError, match="has no 'cuda' kernel, it has xla, pallas, triton"
        ):
            call()


@pytest.mark.parametrize(
    ("implementation", "platform", "message"),
    [
        ("pallas", "cpu", "pallas needs a TPU, the devices here are CPUs"),
        ("pallas", "gpu", "pallas needs a TPU, the devices here are GPUs"),
        ("triton", "cpu", "triton needs a GPU"),
        ("read=cuda,boundary=cuda", "tpu", "cuda needs a GPU, the devices here are TPUs"),
    ],
)
def test_names_are_checked_against_the_devices(implementation, platform, message):
    with pytest.raises(NotImplementedError, match=message):
        dispatch.check_platform(implementation, platform)
    for fine in (None, "xla", "boundary=xla"):
        dispatch.check_platform(fine, platform)


def test_a_named_kernel_raises_under_every_transformation():
    def f(x, h):
        return kp.pre(x, h, implementation="pallas").astype(jnp.float32).sum()

    for call in (f, jax.jit(f), jax.grad(f), jax.vmap(f), jax.checkpoint(f)):
        with pytest.raises(NotImplementedError, match="needs a TPU, this program is for a CPU"):
            call(X[None] if call is not f else X, H[None] if call is not f else H)
    jax.make_jaxpr(f)(X, H)  # a trace says nothing of the platform


def test_the_log_says_once_what_none_takes(caplog):
    dispatch._say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="kernels_pallas"):
        for _ in range(2):
            kp.pre(X, H)
    said = [r.getMessage() for r in caplog.records if r.getMessage().startswith("pre, forward:")]
    kernels = [f"{n} on {p.upper()}s" for p, n in _kernels_here("pre")]
    assert len([text for text in said if "not" not in text]) == 1
    assert said[-1] == "pre, forward: " + ", ".join(
        [*kernels, "xla elsewhere" if kernels else "xla"]
    )


def _kernels_here(op):
    """(platform, implementation) that None would take on this installation."""
    for platform in ("tpu", "gpu"):
        taken = kp.explain(op, platform=platform).choices[0].implementation
        if taken != "xla":
            yield platform, taken


@pytest.mark.parametrize("op", ["mappings", *dispatch.OPS])
def test_explain_on_a_cpu(op):
    explanation = kp.explain(getattr(kp, op), norm=True, platform="cpu")
    parts = {"mappings": {"projection", "coefficients"}}.get(op, {op})
    assert {choice.op for choice in explanation.choices} == parts
    assert len(explanation.choices) == 2 * len(parts)
    for choice in explanation.choices:
        assert choice.implementation == "xla"
        assert set(choice.why_not) == {"pallas", "triton", "cuda"}
        assert choice.why_not["pallas"] == "needs a TPU"
        assert choice.why_not["triton"] == "needs a GPU"
    text = str(explanation)
    assert f"{op} with n=4, C=2560, T=4096, bfloat16 streams on CPUs" in text
    assert "not pallas: needs a TPU" in text


@pytest.mark.parametrize("wrong", [{"T": -1}, {"T": 0.5}, {"n": "4"}, {"C": 0}])
def test_explain_names_a_wrong_size(wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(
        (ValueError, TypeError), match=f"{'width' if name == 'C' else name}={value!r}: "
    ):
        kp.explain("read", platform="cpu", **wrong)


def test_explain_says_what_a_missing_package_would_bring(monkeypatch):
    monkeypatch.setattr(dispatch, "_missing_package", lambda: "the package triton is not installed")
    for op, names in (
        ("boundary", "the first of cuda, triton that takes these sizes"),
        ("pre", "triton"),
    ):
        explanation = kp.explain(op, platform="gpu", C=64)
        assert explanation.note == (
            f"the package triton is not installed. With it {names} would run, else xla; ask again then."
        )
        assert str(explanation).endswith(explanation.note)
    assert kp.explain("pre", platform="cpu", C=64).note == ""


@pytest.mark.gpu_interpreter
@pytest.mark.parametrize(
    ("options", "taken", "why_not"),
    [
        ({}, "cuda", {"triton": "could run; cuda is taken"}),
        ({"C": 100}, "triton", {"cuda": "C=100: the CUDA kernels take multiples of 64"}),
        ({"n": 8}, "triton", {"cuda": "n=8: the CUDA kernels take n = 4"}),
        ({"dtype": "float32"}, "triton", {"cuda": "float32 streams: the CUDA kernels take bf"}),
        ({"n": 3}, "xla", {"triton": "n=3: the kernels", "cuda": "n=3"}),
        ({"num_iterations": 99}, "xla", {"triton": "num_iterations=99", "cuda": "=99"}),
    ],
)
@pytest.mark.parametrize("op", ["read", "boundary"])
def test_explain_on_a_gpu(op, options, taken, why_not):
    for choice in kp.explain(op, platform="gpu", **options).choices:
        assert choice.implementation == taken
        assert choice.why_not["pallas"] == "needs a TPU"
        for name, why in why_not.items():
            assert why in choice.why_not[name]


@pytest.mark.gpu_interpreter
@pytest.mark.parametrize(("capability", "taken"), [("7.5", "xla"), ("7.0", "xla"), ("8.0", "cuda")])
def test_a_gpu_without_bfloat16_takes_xla(monkeypatch, capability, taken):
    """As a T4 (7.5) is; a named kernel says so."""

    class Device:
        compute_capability = capability
        core_count = 40

    monkeypatch.setattr("kernels_pallas.gpu.device._device", Device)
    for op in ("read", "boundary"):
        for choice in kp.explain(op, platform="gpu").choices:
            assert choice.implementation == taken
            if taken == "xla":
                assert f"compute capability {capability}" in choice.why_not["cuda"]
                assert f"compute capability {capability}" in choice.why_not["triton"]
    if taken == "xla":
        text = str(jax.make_jaxpr(lambda x, h: kp.pre(x, h))(X, H))
        assert "platform_index" not in text
        with pytest.raises(NotImplementedError, match=f"compute capability {capability}"):
            kp.pre(X, H, implementation="triton")
        with pytest.raises(NotImplementedError, match=f"compute capability {capability}"):
            dispatch.check_platform("read=triton", "gpu")


@pytest.mark.gpu_interpreter
def test_none_takes_what_explain_says(monkeypatch):
    from kernels_pallas.boundary import cuda, triton

    def backends():
        called = []
        for name, backend in (("cuda", cuda), ("triton", triton)):

            def forward(*args, name=name, real=backend.forward, **static):
                called.append(name)
                return real(*args, **static)

            patches.setattr(backend, "forward", forward)
        streams = jax.ShapeDtypeStruct((5, 4 * 64), BF16)
        y, h, hh = streams.update(shape=(5, 64)), H[:1], jnp.ones((5, 4, 4))
        parameters = jnp.ones((4 * 64, 24)), jnp.ones(24), jnp.ones(3)
        h = jnp.ones((5, 4))
        jax.eval_shape(lambda x, y: kp.boundary(x, y, h, hh, *parameters, n=4), streams, y)
        return called

    for missing, taken in ((None, "cuda"), ("the emulator needs g++", "triton")):
        with monkeypatch.context() as patches:
            patches.setattr(
                "kernels_pallas.gpu.cuda_launch.missing", lambda shared_bytes, why=missing: why
            )
            choice = kp.explain("boundary", C=64, T=5, platform="gpu").choices[0]
            assert choice.implementation == taken
            assert (choice.why_not.get("cuda")) == missing
            assert backends() == [taken]


@pytest.mark.gpu_interpreter
def test_triton_is_triton_alone_and_cuda_raises_where_it_cannot_run(monkeypatch):
    from kernels_pallas.gpu import cuda_launch

    def no_launch(self, *args):
        raise AssertionError(f"{self.kernel} in CUDA C++")

    monkeypatch.setattr(cuda_launch.CudaLaunch, "__call__", no_launch)

    def boundary(implementation):
        parameters = jnp.ones((4 * 64, 24)), jnp.ones(24), jnp.ones(3)
        args = jnp.ones((2, 256), BF16), jnp.ones((2, 64), BF16), jnp.ones((2, 4))
        args += (jnp.ones((2, 4, 4)), *parameters)
        f = lambda *a: kp.boundary(*a, n=4, implementation=implementation)  # noqa: E731
        return jax.eval_shape(lambda *a: jax.vjp(f, *a)[1](f(*a)), *args)

    boundary("triton")
    with pytest.raises(AssertionError, match="mhc_boundary_forward in CUDA"):
        boundary("cuda")
    monkeypatch.setattr(
        "kernels_pallas.gpu.cuda_launch.missing", lambda shared_bytes: "there is no NVRTC"
    )
    with pytest.raises(NotImplementedError, match="'cuda' cannot run: there is no NVRTC"):
        boundary("cuda")


@pytest.mark.parametrize(
    ("op", "message"), [("write", "op='write' is no operation"), ("pre", None)]
)
def test_explain_names_what_it_does_not_know(op, message):
    with pytest.raises(ValueError, match=message or "platform='mps' is unknown: use one of cpu"):
        kp.explain(op, platform="mps" if message is None else None)


def test_kernels_are_asked_about_the_tokens_of_one_device():
    from kernels_pallas.boundary.contract import Parameters
    from kernels_pallas.boundary.reference import read_forward

    mesh = jax.sharding.AbstractMesh((4, 2), ("data", "tensor"))
    parameters = Parameters(jnp.ones((16, 24)), jnp.ones(24), jnp.ones(3), None)
    args = jnp.ones((8, 3, 16)), parameters
    assert on_device(read_forward, args) is args
    with token_sharding(mesh, "data"):
        local = on_device(read_forward, args)
        ragged = on_device(read_forward, (args[0][:7], parameters))
    assert jax.tree.map(jnp.shape, local) == ((2, 3, 16), jax.tree.map(jnp.shape, parameters))
    assert ragged[0].shape == (7, 3, 16)
