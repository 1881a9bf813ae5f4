"""What the Pallas TPU kernels share around their calls: the call itself, checks, flattening.

Interpreter. A named implementation="pallas" raises on a CPU. Inside
`jax.experimental.pallas.tpu.force_tpu_interpret_mode(InterpretParams(...))` the same calls are simulated.
"""

import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.varying import alike, varying_axes

# v5p and TPU7x have 64 MiB of VMEM a core (v5e and v6e 128): 52 MiB leave room for what XLA keeps there.
VMEM_LIMIT = 52 * 2**20
# Blocks of numbers that a kernel reads one by one.
SCALARS = pl.BlockSpec(memory_space=pltpu.SMEM)


def call(
    kernel: Callable,
    *args: jax.Array,
    name: str,
    grid: tuple[int, ...],
    in_specs: Sequence[pl.BlockSpec],
    out_specs: Sequence[pl.BlockSpec],
    out_shapes: Sequence[tuple[tuple[int, ...], jnp.dtype]],
    semantics: Sequence[str],
    scratch_shapes: Sequence = (),
    flops: int = 0,
    transcendentals: int = 0,
) -> list[jax.Array]:
    """`pl.pallas_call` with our VMEM limit and a cost estimate.

    Under `shard_map` the outputs vary over every mesh axis that an input varies over.
    """
    operands = alike(args)  # replicated operands (phi, bias) must be marked varying like the rest
    axes = jax.sharding.ManualAxisType(varying=varying_axes(*operands))
    out_shape = [jax.ShapeDtypeStruct(s, d, manual_axis_type=axes) for s, d in out_shapes]
    moved: list[Any] = [*operands, *out_shape]
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in moved)
    return pl.pallas_call(
        kernel,
        name=name,
        grid=grid,
        in_specs=list(in_specs),
        out_specs=list(out_specs),
        out_shape=out_shape,
        scratch_shapes=list(scratch_shapes),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=tuple(semantics),  # type: ignore[arg-type]
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        cost_estimate=pl.CostEstimate(
            flops=flops, transcendentals=transcendentals, bytes_accessed=size
        ),
    )(*operands)


def call_named(
    kernel: Callable,
    inputs: Mapping[str, tuple[jax.Array, pl.BlockSpec]],
    outputs: Mapping[str, tuple[tuple[int, ...], Any, pl.BlockSpec]],
    scratch: Mapping[str, tuple[tuple[int, ...], Any]],
    **options,
) -> dict[str, jax.Array]:
    """Does `call` for a kernel with many arrays: it gets one namespace, whose fields are their references.

    Args:
      kernel: called with a `types.SimpleNamespace`.
      inputs, outputs, scratch: of each name the array or its shape and dtype, and its blocks.
      **options: as in `call`.

    Returns:
      the outputs by name.
    """
    names = *inputs, *outputs, *scratch

    def with_names(*refs):
        kernel(types.SimpleNamespace(**dict(zip(names, refs, strict=True))))

    results = call(
        with_names,
        *(array for array, _ in inputs.values()),
        in_specs=[spec for _, spec in inputs.values()],
        out_specs=[spec for *_, spec in outputs.values()],
        out_shapes=[(shape, dtype) for shape, dtype, _ in outputs.values()],
        scratch_shapes=[pltpu.VMEM(*shape) for shape in scratch.values()],
        **options,
    )
    return dict(zip(outputs, results, strict=True))


def flat_tokens(x: jax.Array) -> jax.Array:
    """[..., last] -> [T, last]."""
    *lead, last = x.shape
    return x.reshape(math.prod(lead), last)


def tokens_last(x: jax.Array, trailing: int = 1) -> jax.Array:
    """[..., *last] -> [m, T] with m the product of the `trailing` last axes."""
    m = math.prod(x.shape[x.ndim - trailing :])
    return x.reshape(-1, m).T


def tokens_first(x: jax.Array, lead: tuple[int, ...], last: tuple[int, ...]) -> jax.Array:
    """[m, T] -> [*lead, *last]."""
    return x.T.reshape(*lead, *last)
