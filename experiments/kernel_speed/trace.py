"""The kernels of a sublayer as the GPU ran them inside one program: microseconds, and the gaps between them.

    python -m experiments.kernel_speed --trace    # NVIDIA GPU, jax-triton, PyTorch for its profiler; 1 minute

A kernel's time within a program is what a model pays for it: launching programs does not count, and each
kernel finds in L2 what the one before left there. A further sublayer with `boundary` costs half of what the
second program takes longer than the first. Look-ahead kernels have names of their own.
"""

import functools

import jax
import torch
from torch.profiler import ProfilerActivity, profile

from experiments.kernel_speed.cases import sublayer_inputs, sublayers

PROGRAMS = (
    ("read", 1),
    ("boundary", 3),
    ("boundary+norm", 3),
    ("logits", 3),
    ("logits+norm", 3),
    ("look-ahead", 3),
    ("look-ahead+norm", 3),
    ("hc", 3),
    ("hc+norm", 3),
)  # mode and sublayers


def _kernels(f, args) -> list:
    """Events of one run of f, in order of time; the third of four, so that nothing is cold."""
    for _ in range(3):
        jax.block_until_ready(f(*args))
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(4):
            out = f(*args)
        jax.block_until_ready(out)
    on_gpu = torch.autograd.DeviceType.CUDA
    events = [e for e in profiler.events() if e.device_type == on_gpu]
    events.sort(key=lambda e: e.time_range.start)
    count = len(events) // 4
    return events[2 * count : 3 * count]


def run(shapes: tuple[tuple[int, int], ...]) -> list[dict]:
    """Prints and returns the kernels, in order, of every program and (T, C)."""
    programs = []
    torch.zeros(1, device="cuda")  # the profiler needs torch's context
    for T, C in shapes:
        for mode, count in PROGRAMS:
            args = sublayer_inputs(count, mode, jax.random.key(0), T, C)
            events = _kernels(jax.jit(functools.partial(sublayers, None, count, mode)), args)
            start, end = events[0].time_range.start, events[-1].time_range.end
            print(f"T {T} C {C}: {count} sublayer(s), {mode}, {end - start:.1f} us")
            programs.append({"T": T, "C": C, "sublayers": count, "mode": mode, "us": end - start})
            kernels = programs[-1]["kernels"] = []
            for before, event in zip([None, *events], events):
                gap = event.time_range.start - before.time_range.end if before else 0
                us = event.time_range.end - event.time_range.start
                print(f"  {event.name[:60]:60s} {us:8.1f} us, {gap:5.1f} us after the one before")
                kernels.append({"name": event.name, "us": us, "gap_us": gap})
    return programs
