"""Every Triton kernel compiles for sm_80, sm_90 and sm_100 without a GPU, at n = 4 without spills.

In a process of its own: the other Triton tests run in the interpreter, which replaces the compiler.
"""

import os
import pathlib
import re
import subprocess
import sys
import tempfile

import pytest

pytestmark = pytest.mark.gpu_compiler

ROOT = pathlib.Path(__file__).parents[2]


SLOW = pytest.mark.slow  # half a minute each, for the machine code of one more card


@pytest.mark.parametrize(
    "capability", [pytest.param(80, marks=SLOW), 90, pytest.param(100, marks=SLOW)]
)
def test_compiles_without_spills(capability):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment.update(PYTHONPATH=str(ROOT), JAX_PLATFORMS="cpu")
    result = subprocess.run(
        [sys.executable, __file__, str(capability)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    lines = result.stdout.strip().splitlines()
    assert len(lines) >= 30
    spilling = [line for line in lines if not line.endswith("stack 0")]
    assert not spilling, spilling


def launches(capability: int):
    """name -> (launch, pointer types of its inputs and scalars) at n = 4."""
    import jax.numpy as jnp

    from kernels_pallas.boundary import triton_layer_input as layer_input
    from kernels_pallas.boundary.contract import ReadStatic
    from kernels_pallas.coefficients import triton as coefficients
    from kernels_pallas.gpu import sums
    from kernels_pallas.hc import triton_gates
    from kernels_pallas.look_ahead import triton_norm
    from kernels_pallas.post_res import triton as post_res
    from kernels_pallas.pre import triton as pre
    from kernels_pallas.projection import triton as projection
    from kernels_pallas.sinkhorn import triton as sinkhorn

    T, C, n = 4096, 2560, 4
    K, m = n * C, n * n + 2 * n
    f, i = "*fp32", "i32"
    yield "sinkhorn", sinkhorn.launch(sinkhorn.mhc_sinkhorn_forward, T, n, 20), [f, i]
    yield "mappings", coefficients.forward_launch(T, n, 20), [f, f, f, f, i]
    parts = coefficients.forward_launch(T, n, 20, K=K, eps=1e-20, splits=2, stride=32)
    yield "mappings of parts", parts, [f, f, f, f, i]
    yield "finish", projection.finish_launch(T, K, m, 2, 1e-20), [f, i]
    yield "sums", sums.launch(16, (K, m), n, 512, (2112, C)), [f] * 5
    yield "sums with mappings", sums.launch(13, (K, m), n, 512, (2112, C), 40, T), [f] * 5
    yield "sums of look-ahead", sums.launch(13, (K, m), n, 512, (13, C), 40, T, True), [f] * 5
    launch = sums.launch(13, (K, m), n, 512, (13, C), 40, T, pre_rows=T)
    yield "sums of boundary", launch, [f] * 5
    launch = sums.launch(13, (K, 24), n, 512, (13, C), 40, T, pre_rows=T, m=2 * n + 4)
    yield "sums of boundary with 4 logits", launch, [f] * 5
    bf16 = jnp.dtype(jnp.bfloat16)
    static = ReadStatic(n, 20, 1e-20, 1e-6)
    launch = triton_norm.forward_launch(T, C, bf16, static, splits=2, stride=28)
    yield "norm beside mappings", launch, ["*bf16", f, f, f, f, i]
    launch = triton_norm.backward_launch(T, C, bf16, static)
    yield "norm beside mappings backward", launch, ["*bf16", "*bf16", *[f] * 8, i]
    eps = {"sinkhorn_eps": 1e-6, "pre_eps": 1e-6}
    parts = coefficients.forward_launch(T, n, 20, K=K, eps=1e-6, splits=2, stride=28, **eps)
    yield "mappings with eps", parts, [f, f, f, f, i]
    launch = coefficients.backward_launch(T, n, 20, round_ds=True, fragments=K, sinkhorn_eps=1e-6)
    yield "mappings backward with eps", launch, [f] * 7 + [i]
    parts = coefficients.forward_launch(T, n, 20, K=K, eps=1e-20, splits=2, stride=28)
    yield "mappings of forward.cu", parts, [f, f, f, f, i]
    gates = triton_gates.backward_launch(T, C, n, round_ds=True)
    yield "gates of hc backward", gates, [f] * 6 + [i]
    # The forward does several short rows a program.
    static = ReadStatic(n, 20, 1e-20, None)
    launch = layer_input.forward_launch(4 * T, 512, bf16, static, splits=2, stride=28)
    yield "layer input", launch, ["*bf16", f, f, f, f, i]
    for norm, hc in ((None, False), (1e-6, False), (1e-6, True)):
        static = ReadStatic(n, 20, 1e-20, norm)
        launch = layer_input.backward_launch(T, C, bf16, static, hc=hc)
        types = ["*bf16", f, f, "*bf16", f, f, f, f, f, f, i]
        yield f"layer input backward {norm} {hc}", launch, types
        if not hc:
            for logits in (16, 4):
                launch = layer_input.backward_launch(T, C, bf16, static, logits=logits)
                yield f"layer input backward {norm}, {logits} logits", launch, types
                launch = layer_input.forward_launch(
                    T, C, bf16, static, splits=2, stride=28, logits=logits
                )
                yield f"layer input {norm}, {logits} logits", launch, ["*bf16", f, f, f, f, i]
    options = {"accumulate": True, "sharing": n, "capability": capability}
    launch = projection.backward_launch(n * T, C, 1, 2 + n, bf16, **options)
    yield "projection of hc backward", launch, ["*bf16", f, f, f, f, "*bf16", "*bf16", f, i]
    for b, dtype in (("*bf16", jnp.dtype(jnp.bfloat16)), (f, jnp.dtype(jnp.float32))):
        yield f"post_res {b}", post_res.forward_launch(T, C, n, dtype), [b, b, f, f]
        for add in (False, True):
            launch = post_res.backward_launch(T, C, n, dtype, add=add)
            yield f"post_res backward {b} {add}", launch, [b, b, f, f, b, b, b, f]
        yield f"pre {b}", pre.forward_launch(T, C, n, dtype), [b, f]
        for write in (False, True):
            launch = pre.backward_launch(T, C, n, dtype, write_dx=write)
            yield f"pre backward {b} {write}", launch, [b, f, b]
            launch = pre.backward_normed_launch(T, C, n, dtype, 1e-6, write_dx=write)
            yield f"pre normed backward {b} {write}", launch, [b, f, f, b, i]
        yield f"pre normed {b}", pre.forward_normed_launch(T, C, n, dtype, 1e-6), [b, f, f]
        yield f"projection {b}", projection.forward_launch(T, K, m, dtype), [b, b, i]
        for accumulate in (False, True):
            options = {"accumulate": accumulate, "capability": capability}
            launch = projection.backward_launch(T, K, n, m, dtype, **options)
            yield f"projection backward {b} {accumulate}", launch, [b, f, f, f, f, b, b, f, i]


def stack_bytes(launch, types, capability: int) -> int:
    """Stack frame of a thread, where the compiler spills."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    outputs = [{"bfloat16": "*bf16", "float32": "*fp32"}[str(o.dtype)] for o in launch.outputs]
    signature = dict(zip(launch.kernel.arg_names, [*types, *outputs]))
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, t in enumerate(signature.values()) if t[0] == "*"
    }
    signature.update(dict.fromkeys(launch.constants, "constexpr"))
    source = ASTSource(launch.kernel, signature, dict(launch.constants), aligned)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tools = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [tools / "cuobjdump", "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


if __name__ == "__main__":
    for name, launch, types in launches(int(sys.argv[1])):
        print(name, "stack", stack_bytes(launch, types, int(sys.argv[1])), flush=True)
