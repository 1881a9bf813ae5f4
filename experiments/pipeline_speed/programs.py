"""What does a tick of a pipeline copy, and which transfers are hidden? Compiled for H100s, without any.

Command:  python -m experiments.pipeline_speed.programs         (a CPU; a minute)
          python -m experiments.pipeline_speed.programs --connections residual mhc look-ahead \
            --schedules 1f1b dualpipev                            (26 minutes on two busy cores)
          python -m experiments.pipeline_speed.programs --kernels --connections mhc   (mHC's kernels; with the
          extra 'parity' and pip install --no-deps jax-cuda13-plugin==JAXLIB_VERSION)
Needs:    XLA's compiler for NVIDIA GPUs, as a package that needs no CUDA and no GPU:
          pip install --no-deps jax-cuda13-pjrt==JAXLIB_VERSION
Result:   a line an arm; JSON with --output or --record.

The train steps of `experiments.pipeline_speed` on H100s of one host, with three things in place of what can
only be chosen on a GPU or needs libraries of CUDA: products are cuBLAS's, untuned; mHC's operations are their
definitions ("xla") without --kernels; attention is a call that takes and gives the arrays of cuDNN's and is
never run.

GB in a tick of a device that has all blocks of the longest stage (in a V of both its stages, of which a tick
runs one in each direction): what it moves into ring buffers for the backward, beside what kernels and
products write there themselves; what it copies out of them, where an operation takes a slot out and does
nothing else with it; copies of what all ticks hand on (sums of gradients, ring buffers of several slots), in
whatever branch, streams apart. "hidden" sends have the products of a tick between their start and their end.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import os
import sys
import time
from unittest import mock

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported; nothing is run
# jax's plugin, if it is there, looks for cuDNN.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
os.environ["XLA_FLAGS"] = " ".join(
    (
        "--xla_gpu_enable_latency_hiding_scheduler=true",  # as pipeline_speed
        "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false",  # to tune is to run
        "--xla_gpu_mock_custom_calls=true",  # attention's is known to nobody
        os.environ.get("XLA_FLAGS", ""),
    )
).strip()

import jax
import jax.numpy as jnp
import jaxlib
from jax.experimental import topologies

from experiments import cli, output, record
from experiments.pipeline_plan.costs import stage_of
from experiments.pipeline_plan.hidden import count_copies, count_rings, count_sends
from experiments.pipeline_speed import settings
from mhc_jax import fused_attention, sharding
from mhc_jax.config import Config
from mhc_jax.mesh import make_mesh
from mhc_jax.pipeline import check, handover, make_schedule, placement_of
from mhc_jax.pipeline.execute import slots_apart
from mhc_jax.pipeline.tables import make_tables
from mhc_jax.train_step import abstract_batch, abstract_state, jit_train_step

# What the compiler asks of a device.
H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 7 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  device_memory_size: 84929347584
}
"""


def devices(count: int) -> list:
    """Returns H100s of one host to compile for.

    Raises:
      ModuleNotFoundError: there is no compiler for them.
    """
    try:
        found = topologies.get_topology_desc(
            platform="cuda", topology=f"1x1x{count}", target_config=H100
        )
    except NotImplementedError:
        raise ModuleNotFoundError(
            "jax has no compiler for NVIDIA GPUs here: pip install --no-deps "
            f"jax-cuda13-pjrt=={jaxlib.__version__}"
        ) from None
    return list(found.devices)


@jax.custom_vjp
def attention(q, k, v):
    """Stands for cuDNN's: `[B, S, H, D]` each. The compiler knows no more of it than its arrays."""
    return _attention_forward(q, k, v)[0]


def _attention_forward(q, k, v):
    statistics = jax.ShapeDtypeStruct((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)
    call = jax.ffi.ffi_call("attention", (_like(q), statistics))
    out, statistics = call(q, k, v)
    return out, (q, k, v, out, statistics)


def _attention_backward(kept, cotangent):
    call = jax.ffi.ffi_call("attention_backward", tuple(map(_like, kept[:3])))
    return call(*kept, cotangent)


attention.defvjp(_attention_forward, _attention_backward)


def _like(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


@dataclasses.dataclass(frozen=True)
class Program:
    """What the program of an arm has; GB (1e9 bytes) in a tick."""

    connection: str
    schedule: str
    split_backward: bool
    microbatches: int
    written_GB: float
    copied_out_GB: float
    copied_GB: float
    temporaries_GiB: float
    sends: int
    hidden_sends: int
    seconds: float


def ring_shapes(config: Config, chips: list) -> set[tuple[int, ...]]:
    """Returns the shapes of the ring buffers for the backward, slots first."""
    devices, parts = config.mesh.pipe, config.optimizer.accumulate_steps
    schedule = make_schedule(config.pipe_schedule, devices, parts, config.pipe_split_backward)
    tables = make_tables(schedule)
    alone = make_mesh(dataclasses.replace(config.mesh, pipe=1), chips[:1])
    with sharding.tokens_on(alone):  # attention is that of the device
        stage = stage_of(
            config.model,
            placement_of(config, devices).counts,
            config.batch_size // parts,
            config.data.sequence_length,
            split_backward=config.pipe_split_backward,
        )
    num_kept = 1 if slots_apart(alone) else tables.num_kept
    slots = (num_kept, stage.kept), (tables.num_put_off, stage.put_off)
    return {(count, *x.shape) for count, arrays in slots for x in arrays}


def compile_step(config: Config, chips: list, kernels: bool = False) -> Program:
    """Compiles the train step of an arm and counts in its text.

    Args:
      kernels: mHC's operations are the kernels of a GPU, not their definitions.
    """
    begin = time.perf_counter()
    model = dataclasses.replace(config.model, implementation=None if kernels else "xla")
    config = dataclasses.replace(config, model=model)
    mesh = make_mesh(config.mesh, chips)
    with mock.patch.object(fused_attention, "_cudnn", attention):
        shapes = ring_shapes(config, chips)
        lowered = jit_train_step(config, mesh).lower(
            abstract_state(config, mesh), abstract_batch(config)
        )
    compiled = lowered.compile()
    text, parts = compiled.as_text(), config.optimizer.accumulate_steps
    rings, sends = count_rings(text, shapes), count_sends(text)
    handed = handover.shapes(model, config.batch_size // parts, config.data.sequence_length)
    # Streams, and what `rings` counts.
    apart = jax.eval_shape(handover.packed, handed).shape, *(s for s in shapes if s[0] == 1)
    return Program(
        settings.connection_of(model),
        config.pipe_schedule,
        config.pipe_split_backward,
        parts,
        written_GB=rings.written / 1e9,
        copied_out_GB=rings.copied_out / 1e9,
        copied_GB=sum(count_copies(text, apart=apart).values()) / 1e9,
        temporaries_GiB=compiled.memory_analysis().temp_size_in_bytes / 2**30,
        sends=sends.total,
        hidden_sends=sends.hidden,
        seconds=time.perf_counter() - begin,
    )


def parse_arguments() -> argparse.Namespace:
    parser = cli.Parser(prog="python -m experiments.pipeline_speed.programs", description=__doc__)
    settings.add_arguments(parser, toy="small", microbatches=[32])
    parser.add_argument("--kernels", action="store_true", help="mHC's operations as GPUs run them")
    output.add_arguments(parser)
    return settings.parse(parser)


def configs_of(options: argparse.Namespace) -> list[Config]:
    """Returns the configurations of all arms. Raises ValueError for one that cannot be."""
    if "gpipe" in options.schedules:
        raise ValueError("--schedules=gpipe: autodiff decides what waits; take 1f1b or dualpipev")
    kinds = (False, True) if options.split_backward else (False,)
    found = [
        settings.make_config(options, connection, schedule, parts, splits)
        for schedule, parts, connection, splits in itertools.product(
            options.schedules, options.microbatches, options.connections, kinds
        )
    ]
    for config in found:
        check(config, dataclasses.asdict(config.mesh))
    return found


def main() -> None:
    options = parse_arguments()
    if options.kernels:
        for package, extra in (
            ("triton", "-e '.[parity]'"),
            ("jax_cuda13_plugin", f"--no-deps jax-cuda13-plugin=={jaxlib.__version__}"),
        ):
            if importlib.util.find_spec(package) is None:
                sys.exit(f"--kernels needs {package}: pip install {extra}")
    try:
        todo = configs_of(options)
        chips = devices(options.pipe)
    except ValueError as error:
        sys.exit(f"bad input: {error}")
    except ModuleNotFoundError as error:
        sys.exit(str(error))
    name = chips[0].device_kind
    print(f"compiled for {options.pipe} x {name}, {os.environ['XLA_FLAGS']}")
    print(
        f"{'connection':<12}{'schedule':<17}{'parts':>6}{'GB written':>12}{'copied out':>12}{'copied':>8}"
        f"{'temporaries, GiB':>18}{'hidden sends':>14}",
        flush=True,
    )
    programs: list[Program] = []
    for config in todo:
        print(f"compiling arm {len(programs) + 1} of {len(todo)}", file=sys.stderr, flush=True)
        arm = compile_step(config, chips, options.kernels)
        programs.append(arm)
        schedule = f"{arm.schedule} split" if arm.split_backward else arm.schedule
        print(
            f"{arm.connection:<12}{schedule:<17}{arm.microbatches:>6}{arm.written_GB:>12.2f}"
            f"{arm.copied_out_GB:>12.2f}{arm.copied_GB:>8.2f}{arm.temporaries_GiB:>18.1f}"
            f"{arm.hidden_sends:>9} of {arm.sends}",
            flush=True,
        )
        found = {
            "compiled_for": {"device": name, "count": options.pipe},
            "flags": os.environ["XLA_FLAGS"],
            "shape": output.shape_of(options),
            "programs": [dataclasses.asdict(each) for each in programs],
        }
        slug = record.device_slug(name, options.pipe)
        with_kernels = "_kernels" if options.kernels else ""
        output.write(options, "pipeline_speed", found, device=f"{slug}_compiled{with_kernels}")


if __name__ == "__main__":
    cli.run(main)
