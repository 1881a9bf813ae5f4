"""Says where the time of a train step goes: the kernels of a GPU, in groups that readers of the model know.

`jax.profiler` says which instruction of the program a kernel belongs to, and the program which line of the
model (`jax.named_scope`) an instruction comes from. If it sees no kernels, PyTorch's profiler is asked, which
knows a kernel by its name alone: the matmuls of cuBLAS are then not told apart.
"""

import collections
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax


class Event(NamedTuple):
    """One run of one kernel.

    Attributes:
      kernel: as the device calls it.
      instruction: of the compiled program, "" if unknown.
      start, end: microseconds.
      device: that ran it, "" if unknown.
    """

    kernel: str
    instruction: str
    start: float
    end: float
    device: str = ""


class Row(NamedTuple):
    """Events of the same instruction, or of the same kernel where that is unknown."""

    group: str
    kernel: str
    source: str
    count: float
    ms: float


_METADATA = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*metadata={[^}]*op_name="([^"]*)"', re.M)

# Control flow: on a CPU an event of its own that spans what is inside.
_CONTAINER = re.compile(r"(while|call|conditional)(\.\d+)*$")

# A kernel whose name says what it is; first match wins.
_BY_KERNEL = (
    ("collectives", r"nccl|all-?reduce|all-?gather|reduce-?scatter"),
    ("attention kernel", r"fmha|cudnn|flash|sdpa"),
    ("expert matmuls", r"ragged_dot|mosaic_gpu"),
    ("mHC kernels", r"mhc_[a-z_]+_(forward|backward)"),
    ("copies", r"memcpy|memset"),
)
_MATMUL = r"gemm|nvjet|cublas|cutlass|xmma|dot_general|^dot"
# Scopes of mhc_jax in the name of an operation; first match wins.
_BY_SCOPE = (
    ("optimizer", r"optimizer"),
    ("unembedding and loss", r"unembedding"),
    ("experts", r"routed_experts"),
    ("router", r"router"),
    ("shared experts and dense FFN", r"ffn_sublayer"),
    ("attention", r"attention_sublayer"),
    ("connections", r"connection"),
)


def group_of(kernel: str, source: str) -> str:
    """Returns the part of the model that a kernel works for.

    Args:
      kernel: its name and that of its instruction.
      source: `op_name` of the instruction, "" if unknown.
    """
    kernel, source = kernel.lower(), source.lower()
    for group, pattern in _BY_KERNEL:
        if re.search(pattern, kernel) or (group == "expert matmuls" and re.search(pattern, source)):
            return group
    is_matmul = re.search(_MATMUL, kernel) or source.endswith("dot_general")
    part = next((part for part, pattern in _BY_SCOPE if re.search(pattern, source)), None)
    if part is None:
        if is_matmul:
            return "other matmuls"
        stacks = re.search(r"dynamic.(update.)?slice", f"{kernel} {source}")
        return "scan: stacking and slicing" if stacks else "embedding, casts, copies and others"
    return f"{part}: {'matmuls' if is_matmul else 'the rest'}"


def sources(program: str) -> dict[str, str]:
    """Returns instruction -> `op_name`, from the text of a compiled program."""
    return dict(_METADATA.findall(program))


def rows(events: Iterable[Event], op_names: dict[str, str], steps: int) -> list[Row]:
    """Returns the time of each instruction a step, longest first."""
    # XLA names a kernel of its own after the instruction, without dots and dashes.
    by_kernel = {re.sub(r"[.\-]", "_", name): name for name in op_names}
    total = collections.defaultdict(lambda: [0, 0.0])
    for event in events:
        # Inside of a CUDA graph the profiler names the graph: not in the program, but its kernels may be.
        known = event.instruction in op_names
        instruction = event.instruction if known else by_kernel.get(event.kernel, event.instruction)
        entry = total[event.kernel, op_names.get(instruction, ""), instruction]
        entry[0] += 1
        entry[1] += event.end - event.start
    found = [
        Row(
            group_of(f"{kernel} {instruction}", source), kernel, source, n / steps, us / steps / 1e3
        )
        for (kernel, source, instruction), (n, us) in total.items()
    ]
    return sorted(found, key=lambda row: -row.ms)


def busy_ms(events: Iterable[Event]) -> float:
    """Returns the time in which at least one kernel ran."""
    total, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event.start):
        total += max(event.end - max(event.start, until), 0.0)
        until = max(until, event.end)
    return total / 1e3


def record(run: Callable[[], None]) -> tuple[str, list[Event]]:
    """Returns the name of the profiler and the kernels of `run`, which must wait for the device itself."""
    with tempfile.TemporaryDirectory() as folder:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # only slows the host down
        with jax.profiler.trace(folder, profiler_options=options):
            run()
        events = [
            event
            for path in pathlib.Path(folder).rglob("*.xplane.pb")
            for event in _read(path)
            if not _CONTAINER.match(event.kernel)
        ]
    if events or jax.devices()[0].platform != "gpu":
        return "jax.profiler", events
    return "torch.profiler", _record_with_torch(run)


def _read(path: pathlib.Path) -> Iterable[Event]:
    """Reads events of kernels; on a CPU of instructions, which overlap where they run in several threads."""
    planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    for plane in devices or planes:
        for line in plane.lines:
            if devices and not line.name.startswith("Stream"):
                continue  # the same events once more, by another view
            for event in line.events:
                instruction = str(dict(event.stats).get("hlo_op", ""))
                if devices or instruction:
                    start = event.start_ns / 1e3
                    end = start + event.duration_ns / 1e3
                    yield Event(event.name, instruction, start, end, plane.name)


def _record_with_torch(run: Callable[[], None]) -> list[Event]:
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.zeros(1, device="cuda")  # the profiler needs torch's context
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
    on_gpu = torch.autograd.DeviceType.CUDA
    return [
        Event(event.name, "", event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == on_gpu
    ]


def by_group(found: list[Row]) -> dict[str, float]:
    """Returns group -> milliseconds a step, longest first."""
    groups = collections.Counter()
    for row in found:
        groups[row.group] += row.ms
    return dict(groups.most_common())


def report(found: list[Row], step_ms: float, busy: float, top: int = 40) -> str:
    """Lists the groups, then the longest kernels: milliseconds a step and share of the step."""
    lines = [f"  {'part':48}{'ms a step':>10}{'of step':>9}"]
    lines += [
        f"  {group:48}{ms:>10.2f}{ms / step_ms:>9.1%}" for group, ms in by_group(found).items()
    ]
    again = sum(row.ms for row in found if "rematted_computation" in row.source)
    lines.append(f"  {'(of all these: computed again)':48}{again:>10.2f}{again / step_ms:>9.1%}")
    idle = max(step_ms - busy, 0.0)
    lines.append(f"  {'nothing runs':48}{idle:>10.2f}{idle / step_ms:>9.1%}")
    lines += ["", f"  {'longest kernels':48}{'ms a step':>10}{'of step':>9}{'runs':>7}  from"]
    lines += [
        f"  {row.kernel[:47]:48}{row.ms:>10.2f}{row.ms / step_ms:>9.1%}{row.count:>7.0f}"
        f"  {row.group} | {row.source[-70:]}"
        for row in found[:top]
    ]
    return "\n".join(lines)
