"""Programs that test_pallas_compile.py gives to the TPU compiler, in a process of their own."""

import collections
import functools
import inspect
import json
import re
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies

import kernels_pallas as kp
from configs import default
from mhc_jax.config import from_dict
from mhc_jax.mesh import make_mesh
from mhc_jax.train_step import abstract_batch, abstract_state, jit_train_step

TRAIN = {
    **{"model.num_blocks": 3, "model.width": 256, "model.num_heads": 2, "model.ffn_width": 256},
    **{"model.connection": "mhc", "model.dtype": "bfloat16", "model.vocab_size": 512},
    **{"data.sequence_length": 256, "batch_size": 8},
}
WIDTHS = (1280, 2560, 4096, 7168)
BOTH = ("forward", "backward")
# mappings and sinkhorn do not see the width.
NARROW = {f"mhc_{op}_{direction}" for op in ("coefficients", "sinkhorn") for direction in BOTH}
WIDE = {f"mhc_{op}_{direction}" for op in ("projection", "pre", "post_res") for direction in BOTH}
WIDE |= {f"mhc_pre_{direction}_normed" for direction in BOTH}
WIDE |= {f"mhc_{op}_{direction}" for op in ("read", "boundary") for direction in BOTH}


def with_gradients(f, *args):
    outputs, vjp = jax.vjp(f, *args)
    return outputs, vjp(outputs)


OTHER = {"sinkhorn_eps": 1e-6, "last": "columns", "pre_eps": 1e-6}  # another convention


def wide_kernels(implementation, **convention):
    """Outputs and gradients of every op whose kernels hold rows; no kernel twice."""
    options = {"implementation": implementation}

    def pre(x, h_pre, weight):
        normed = kp.pre(x, h_pre, norm_weight=weight, norm_eps=1e-6, **options)
        return normed, kp.pre(x, h_pre, **options)

    def program(x, y, h_pre, h_post, h_res, phi, bias, alpha, weight):
        parameters, norm = (
            (phi, bias, alpha, weight),
            {"n": h_pre.shape[-1], "input_norm_eps": 1e-6, **convention},
        )

        def read(x, phi, bias, alpha, weight):
            fused = {**norm, **options, "input_norm_weight": weight}
            return kp.read(x, phi, bias, alpha, **fused)

        def boundary(x, y, h_post, h_res, phi, bias, alpha, weight):
            fused = {**norm, **options, "input_norm_weight": weight}
            return kp.boundary(x, y, h_post, h_res, phi, bias, alpha, **fused)

        projection = functools.partial(kp.projection, **options)
        post_res = functools.partial(kp.post_res, **options)
        return (
            with_gradients(projection, x, phi),
            with_gradients(pre, x, h_pre, weight),
            with_gradients(boundary, x, y, h_post, h_res, *parameters),
            with_gradients(post_res, x, y, h_post, h_res),
            with_gradients(read, x, *parameters),
        )

    return program


def narrow_kernels(implementation, **convention):
    of_sinkhorn = {"eps": convention["sinkhorn_eps"]} if convention else {}
    options = {"implementation": implementation}

    def program(s, r, bias, alpha, h_res):
        n = h_res.shape[-1]
        coefficients = functools.partial(kp.coefficients, n=n, **options, **convention)
        return (
            with_gradients(coefficients, s, r, bias, alpha),
            with_gradients(functools.partial(kp.sinkhorn, **options, **of_sinkhorn), h_res),
        )

    return program


def lower(program, topology, width, num_tokens=2048, n=4):
    """Lowered for one chip of the topology, arguments by name."""
    T, C, m, f32 = num_tokens, width, n * n + 2 * n, jnp.float32
    shapes = {
        **{"x": (T, n * C), "y": (T, C), "h_pre": (T, n), "h_post": (T, n), "h_res": (T, n, n)},
        **{
            "phi": (n * C, m),
            "theta": (2 + n, C),
            "bias": (m,),
            "alpha": (3,),
            "weight": (C,),
            "s": (T, m),
            "r": (T,),
        },
    }
    args = [
        jax.ShapeDtypeStruct(shapes[name], jnp.bfloat16 if name in "xy" else f32)
        for name in inspect.signature(program).parameters
    ]
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    place = jax.sharding.SingleDeviceSharding(device)
    return jax.jit(program, in_shardings=place, out_shardings=place).lower(*args)


def kernels_of(lowered) -> set[str]:
    return set(re.findall(r'"(mhc_\w+)"', lowered.as_text()))


def compile_kernels(topology, *widths):
    """Every kernel at these widths for one chip."""
    lowered = lower(narrow_kernels("pallas"), topology, 128)
    assert kernels_of(lowered) == NARROW, kernels_of(lowered)
    lowered.compile()
    for width in map(int, widths):
        lowered = lower(wide_kernels("pallas"), topology, width)
        assert kernels_of(lowered) == WIDE, kernels_of(lowered)
        lowered.compile()
        print("compiled", width, flush=True)


def compile_other_n(topology):
    """Every kernel at the narrowest width for 2 streams, there in another convention, and 8."""
    for n in (2, 8):
        for program, width in ((narrow_kernels, 128), (wide_kernels, WIDTHS[0])):
            convention = OTHER if n == 2 else {}
            lowered = lower(program("pallas", **convention), topology, width, n=n)
            assert kernels_of(lowered) == (NARROW if width == 128 else WIDE), kernels_of(lowered)
            lowered.compile()
        print("compiled", n, flush=True)


def logits_kernels(n, k):
    """Outputs and gradients of the fused operations with k logits."""
    options = {"n": n, "input_norm_eps": 1e-6, "implementation": "pallas"}

    def program(x, y, h_post, h_res, phi, bias, alpha, weight):
        phi, bias = (jnp.concatenate([a, a], axis=-1)[..., : 2 * n + k] for a in (phi, bias))

        def fused(op, *args):
            *args, weight = args
            return op(*args, input_norm_weight=weight, **options)

        parameters = phi, bias, alpha, weight
        read, boundary = (
            functools.partial(fused, op) for op in (kp.read_logits, kp.boundary_logits)
        )
        return (
            with_gradients(read, x, *parameters),
            with_gradients(boundary, x, y, h_post, h_res, *parameters),
        )

    return program


def look_ahead(implementation):
    """Outputs and gradients of `look_ahead`, which is `boundary` with other sums between."""
    options = {"input_norm_eps": 1e-6, "implementation": implementation}

    def program(x, y, h_post, h_res, h_pre, phi, bias, alpha, weight):
        def op(*args):
            *args, weight = args
            return kp.look_ahead(*args, n=4, input_norm_weight=weight, **options)

        return with_gradients(op, x, y, h_post, h_res, h_pre, phi, bias, alpha, weight)

    return program


def compile_logits(topology):
    """The fused kernels without Sinkhorn at the narrowest width: any n, more and fewer columns."""
    fused = {f"mhc_{op}_{direction}" for op in ("read", "boundary") for direction in BOTH}
    for n, k in ((3, 6), (4, 24), (5, 0), (8, 28)):
        lowered = lower(logits_kernels(n, k), topology, WIDTHS[0], n=n)
        assert kernels_of(lowered) == fused, kernels_of(lowered)
        lowered.compile()
        print("compiled", n, flush=True)


def hc_kernels(n):
    """Outputs and gradients of the fused operations of Hyper-Connections."""
    options = {"n": n, "input_norm_eps": 1e-6, "implementation": "pallas"}

    def program(x, y, h_post, h_res, theta, bias, alpha, weight):
        def fused(op, *args):
            *args, weight = args
            return op(*args, input_norm_weight=weight, **options)

        parameters = theta, bias, alpha, weight
        read, boundary = (functools.partial(fused, op) for op in (kp.hc_read, kp.hc_boundary))
        return (
            with_gradients(read, x, *parameters),
            with_gradients(boundary, x, y, h_post, h_res, *parameters),
        )

    return program


def compile_hc(topology):
    """Those of Hyper-Connections, at every width for four streams."""
    names = {f"mhc_hc_{op}_{direction}" for op in ("read", "boundary") for direction in BOTH}
    for n, width in ((4, 1280), (4, 2560), (4, 4096), (4, 7168), (3, 1280), (8, 1280)):
        lowered = lower(hc_kernels(n), topology, width, n=n)
        assert kernels_of(lowered) == names, kernels_of(lowered)
        lowered.compile()
        print("compiled", f"{n}x{width}", flush=True)


def compile_look_ahead(topology):
    """At every width for one chip."""
    names = {f"mhc_look_ahead_{direction}" for direction in BOTH}
    for width in WIDTHS:
        for implementation in ("pallas", None):
            lowered = lower(look_ahead(implementation), topology, width)
            assert kernels_of(lowered) == names, kernels_of(lowered)
        lowered.compile()
        print("compiled", width, flush=True)


def choose_kernels(topology):
    """implementation=None takes the kernels when it is lowered for a TPU, "xla" takes none."""
    for program, names in ((wide_kernels, WIDE), (narrow_kernels, NARROW)):
        for implementation, expected in ((None, names), ("xla", set())):
            lowered = lower(program(implementation), topology, 128)
            assert kernels_of(lowered) == expected, (implementation, kernels_of(lowered))
    print("chosen")


def compile_train_step(topology):
    """A whole train step, kernels per device: the custom calls of a scan over 3 blocks."""
    values = default.get_config()
    values.update_from_flattened_dict(TRAIN)
    config = from_dict(values)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(config.mesh, devices)
    lowered = jit_train_step(config, mesh).lower(
        abstract_state(config, mesh), abstract_batch(config)
    )
    compiled = lowered.compile().as_text()
    calls = collections.Counter(
        re.findall(r'custom_call_target="tpu_custom_call".*?(mhc_\w+)', compiled)
    )
    print(json.dumps(calls))


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
