"""pipeline_plan: the simulated timeline by hand, and the command."""

import itertools
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from experiments.pipeline_plan.costs import BlockTimes, connection_elements, stage_times
from experiments.pipeline_plan.hidden import count_copies, count_rings, count_sends
from mhc_jax.pipeline import make_schedule, place
from mhc_jax.pipeline.layout import block_flops
from mhc_jax.pipeline.timeline import StageTimes, simulate


def alike(stages, forward=1.0, backward=2.0, recompute=0.0):
    ones = np.ones(stages)
    return StageTimes(forward * ones, 0 * ones, recompute * ones, backward * ones, ones)


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_without_transfers_the_bubble_is_that_of_the_books(name):
    timeline = simulate(make_schedule(name, 4, 8), alike(4), 0.0)
    assert timeline.seconds == pytest.approx((8 + 4 - 1) * 3)
    assert timeline.ideal == 24


def test_what_hides_a_transfer():
    schedule = make_schedule("1f1b", 2, 16)

    def seconds(transfer, **times):
        return simulate(schedule, alike(2, **times), transfer).seconds

    free = seconds(0.0)
    # Up to the shorter of the works beside it, only the ramps at both ends show it.
    assert seconds(0.5) - free == pytest.approx(2 * 0.5)
    # A longer one stops every tick.
    assert seconds(1.5) - free > 16 * 0.4
    # What is computed again begins while the cotangent is on its way.
    events = simulate(schedule, alike(2, recompute=0.25), 0.5).events
    [again] = [e for e in events if e[:4] == (0, "recompute", 0, 5)]
    [arrives] = [e for e in events if e[:4] == (1, "send_backward", 1, 5)]
    [back] = [e for e in events if e[:4] == (0, "backward", 0, 5)]
    assert arrives.start < arrives.end <= back.start
    assert again.end <= back.start


def test_what_is_put_off_fills_idle_ticks():
    """The last device idles before its first forward, and no longer behind its last backward."""
    whole, split = (
        simulate(make_schedule("1f1b", 4, 16, split), alike(4), 0.0) for split in (False, True)
    )
    assert (whole.ideal, split.ideal) == (48, 48)
    assert (whole.seconds, split.seconds) == (48 + 3 * 3, 48 + 3)
    last = [e for e in split.events if e.device == 3]
    assert (last[0].start, last[-1].end) == (3, split.seconds)
    assert [e.kind for e in last[-4:]] == ["matrices"] * 4
    assert sum(e.end - e.start for e in last) == 48


def test_events_do_not_overlap_and_take_their_time():
    schedule = make_schedule("dualpipev", 3, 7, True)
    times = StageTimes(*np.random.default_rng(0).uniform(0.5, 2, (4, 6)), np.full(6, 0.2))
    timeline = simulate(schedule, times, 0.3)
    for device in range(3):
        mine = [e for e in timeline.events if e.device == device and e.to < 0]
        assert all(a.end <= b.start + 1e-9 for a, b in itertools.pairwise(mine))
    sends = [e for e in timeline.events if e.kind == "send_forward"]
    # All but those of the turn of the V, which stay on a device, and the last stage's.
    assert len(sends) == 4 * 7
    begins = {(e.stage, e.microbatch): e.start for e in timeline.events if e.kind == "forward"}
    ends = {(e.stage, e.microbatch): e.end for e in timeline.events if e.kind == "forward"}
    for e in sends:
        assert ends[e.stage, e.microbatch] <= e.start + 1e-9
        assert e.end <= begins[e.stage + 1, e.microbatch] + 1e-9


def test_times_of_stages():
    placement = place(5, 2, "1f1b", num_leading=1)
    times = stage_times(BlockTimes(1.0, 0.5, 2.0, 4.0), placement, 1)
    assert placement.counts == (2, 2)
    assert times.total.tolist() == [1 + 3 + 2 * 0.5 + 3 * 2, 2 + 4 + 2 * 0.5 + 2 * 2]


@pytest.mark.slow
def test_the_command(tmp_path):
    file = pathlib.Path(__file__).with_name("pipeline_plan_cases.py")
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(file), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(root)}, cwd=root,
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert not done.returncode, done.stderr[-3000:]
    cases = done.stdout.split("case ")[1:]
    first = cases[0]
    assert "8 devices, 32 micro-batches of 4096 tokens" in first
    assert (tmp_path / "plan.png").stat().st_size > 20_000
    assert (tmp_path / "plan.svg").read_text().startswith("<?xml")
    found = json.loads((tmp_path / "plan.json").read_text())
    rows = {(row["connection"], row["link"]): row for row in found["rows"]}
    # n streams of C bfloat16 entries.
    assert rows["mhc", 50]["payload"] == 4 * rows["residual", 50]["payload"] == 4 * 2560 * 4096 * 2
    for connection in ("residual", "mhc"):
        exposed = [rows[connection, link]["exposed"] for link in (400, 50, 25)]
        assert exposed == sorted(exposed)
    assert sum(found["counts"]) == 29
    messages = [case.splitlines()[1:] for case in cases[1:]]
    assert messages[0] == [
        "bad input: mesh.pipe=16 under dualpipev has 32 stages, the model 29 blocks beside 1 leading: use "
        "fewer stages or more blocks (model.num_blocks=30)"
    ]
    assert "dualpipev: 8 devices, 4 micro-batches" in messages[1][0]
    assert messages[2][0].startswith(
        "bad input: schedule='fast' is unknown: use one of gpipe, 1f1b"
    )
    assert messages[3] == ["bad input: --pipe=0 must be at least 1 and at most 65536"]
    assert messages[4] == ["bad input: --links=fast: give numbers, in GB/s"]
    assert messages[5] == ["bad input: --forward_ms=-1.0 must be at least 0, in milliseconds"]
    most = "must be at least 1 and at most 65536"
    assert messages[6] == [f"bad input: --microbatches=99999999999999999 {most}"]
    [line] = messages[7]
    assert line.endswith("262144 of at most 65536: lower --microbatches to 8192")
    assert "has 4096 stages, the model 29 blocks" in messages[8][0]
    assert messages[9] == [f"bad input: --sequences=99999999999999999 {most}"]
    assert messages[10] == ["bad input: --links=: give numbers, in GB/s"]


@pytest.mark.parametrize(
    ("fields", "elements"),
    [
        ({"connection": "residual"}, (3, 3)),
        ({"n": 4}, (18, 27)),
        ({"n": 4, "lookahead_pre": True}, (10, 15)),
    ],
)
def test_what_connections_move(fields, elements):
    """In C a token and sublayer, forward and backward, as in the cost models of the kernels."""
    from configs import default
    from mhc_jax.config import from_dict

    values = default.get_config()
    values.model.update(fields)
    model = from_dict(values).model
    assert connection_elements(model) == tuple(count * model.width for count in elements)


def test_flops_of_a_block_are_those_of_its_active_parameters():
    from configs import paper_27b
    from mhc_jax.config import from_dict
    from mhc_jax.describe import count_parameters, sums

    model = from_dict(paper_27b.get_config()).model
    active = sums(count_parameters(model)).active
    head = model.width * model.vocab_size
    # A leading block has as many as a token uses in the others, but for the router.
    expected = 2 * (active - head) / model.num_blocks
    assert block_flops(model, sequence_length=0) == pytest.approx(expected, rel=0.01)


PROGRAM = """
HloModule jit_step, is_scheduled=true

%inner (x.1: f32[8]) -> f32[8] {
  %x.1 = f32[8]{0} parameter(0)
  ROOT %inside = f32[8]{0} collective-permute(%x.1), source_target_pairs={{0,1}}
}

%branch_0 (x.2: f32[8]) -> f32[8] {
  %x.2 = f32[8]{0} parameter(0)
  ROOT %called = f32[8]{0} call(%x.2), to_apply=%inner
}

%branch_1 (x.3: f32[8]) -> f32[8] {
  ROOT %x.3 = f32[8]{0} parameter(0)
}

ENTRY %main (p: s32[], x: f32[8]) -> f32[8] {
  %p = s32[] parameter(0)
  %x = f32[8]{0} parameter(1)
  %start = (f32[8]{0}, f32[8]{0}) collective-permute-start(%x), source_target_pairs={{0,1}}
  %early = (f32[8]{0}, f32[8]{0}) collective-permute-start(%x), source_target_pairs={{1,0}}
  %ended = f32[8]{0} collective-permute-done(%early)
  %work = f32[8]{0} conditional(%p, %x, %x), branch_computations={%branch_0, %branch_1}
  %end = f32[8]{0} collective-permute-done(%start)
  ROOT %sum = f32[8]{0} add(%work, %end)
}
"""


def test_sends_are_counted():
    assert count_sends(PROGRAM) == (3, 1, 1, (1,))
    assert count_sends(PROGRAM.replace("to_apply=%inner", "to_apply=%branch_1"))[:3] == (3, 1, 0)
    work = next(line for line in PROGRAM.splitlines() if "%work" in line)
    twice = PROGRAM.replace(work, f"{work}\n{work.replace('%work', '%again')}")
    assert count_sends(twice).beside == (2,)


TICKS = """
HloModule jit_step, is_scheduled=true

%run (r: (f32[3,8], f32[8])) -> (f32[3,8], f32[8]) {
  %r = (f32[3,8]{1,0}, f32[8]{0}) parameter(0)
  %ring = f32[3,8]{1,0} get-tuple-element(%r), index=0
  %kept = f32[3,8]{1,0} copy(%ring)
  %x = f32[8]{0} get-tuple-element(%r), index=1
  %other = f32[2,8]{1,0} copy(%x)
  ROOT %ran = (f32[3,8]{1,0}, f32[8]{0}) tuple(%kept, %x)
}

%skip (s: (f32[3,8], f32[8])) -> (f32[3,8], f32[8]) {
  ROOT %s = (f32[3,8]{1,0}, f32[8]{0}) parameter(0)
}

%tick (t: (f32[3,8], f32[8])) -> (f32[3,8], f32[8]) {
  %t = (f32[3,8]{1,0}, f32[8]{0}) parameter(0)
  %p = s32[] constant(0)
  %made = (f32[3,8]{1,0}, f32[8]{0}) conditional(%p, %t, %t), branch_computations={%skip, %run}
  %ring.1 = f32[3,8]{1,0} get-tuple-element(%made), index=0
  %x.1 = f32[8]{0} get-tuple-element(%made), index=1
  %streams = f32[8]{0} copy(%x.1)
  ROOT %next = (f32[3,8]{1,0}, f32[8]{0}) tuple(%ring.1, %streams)
}

%more (m: (f32[3,8], f32[8])) -> pred[] {
  %m = (f32[3,8]{1,0}, f32[8]{0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (begin: (f32[3,8], f32[8])) -> (f32[3,8], f32[8]) {
  %begin = (f32[3,8]{1,0}, f32[8]{0}) parameter(0)
  ROOT %end = (f32[3,8]{1,0}, f32[8]{0}) while(%begin), condition=%more, body=%tick
}
"""


def test_copies_of_a_tick_are_counted():
    assert count_copies(TICKS) == {"f32[3, 8]": 96, "f32[8]": 32}
    assert count_copies(TICKS, apart=((8,),)) == {"f32[3, 8]": 96}
    assert count_copies(TICKS.replace("conditional(", "call(")) == {}


SLOTS = """
HloModule jit_step, is_scheduled=true

%put (p.0: f32[3,8], p.1: f32[8], p.2: s32[]) -> f32[3,8] {
  %p.0 = f32[3,8]{1,0} parameter(0)
  %p.1 = f32[8]{0} parameter(1)
  %p.2 = s32[] parameter(2)
  %new = f32[1,8]{1,0} bitcast(%p.1)
  %zero = s32[] constant(0)
  ROOT %put.1 = f32[3,8]{1,0} dynamic-update-slice(%p.0, %new, %p.2, %zero)
}

%take (t.0: f32[3,8], t.1: s32[]) -> (f32[8], f32[8]) {
  %t.0 = f32[3,8]{1,0} parameter(0)
  %t.1 = s32[] parameter(1)
  %zero.1 = s32[] constant(0)
  %slot = f32[1,8]{1,0} dynamic-slice(%t.0, %t.1, %zero.1), dynamic_slice_sizes={1,8}
  %whole = f32[8]{0} bitcast(%slot)
  %twice = f32[8]{0} add(%whole, %whole)
  ROOT %both = (f32[8]{0}, f32[8]{0}) tuple(%whole, %twice)
}

%run (r: (f32[3,8], f32[5,8], s32[])) -> f32[3,8] {
  %r = (f32[3,8]{1,0}, f32[5,8]{1,0}, s32[]) parameter(0)
  %ring = f32[3,8]{1,0} get-tuple-element(%r), index=0
  %slot.1 = s32[] get-tuple-element(%r), index=2
  %other = f32[5,8]{1,0} get-tuple-element(%r), index=1
  %of_other = f32[1,8]{1,0} dynamic-slice(%other, %slot.1, %slot.1), dynamic_slice_sizes={1,8}
  %taken = (f32[8]{0}, f32[8]{0}) fusion(%ring, %slot.1), kind=kLoop, calls=%take
  %x = f32[8]{0} get-tuple-element(%taken), index=0
  %once = f32[3,8]{1,0} fusion(%ring, %x, %slot.1), kind=kLoop, calls=%put
  ROOT %again = f32[3,8]{1,0} dynamic-update-slice(%once, %of_other, %slot.1, %slot.1)
}

%skip (s: (f32[3,8], f32[5,8], s32[])) -> f32[3,8] {
  %s = (f32[3,8]{1,0}, f32[5,8]{1,0}, s32[]) parameter(0)
  %ring.1 = f32[3,8]{1,0} get-tuple-element(%s), index=0
  %slot.2 = s32[] get-tuple-element(%s), index=2
  %y = f32[8]{0} constant(0)
  ROOT %left = f32[3,8]{1,0} fusion(%ring.1, %y, %slot.2), kind=kLoop, calls=%put
}

%tick (t: (f32[3,8], f32[5,8], s32[])) -> (f32[3,8], f32[5,8], s32[]) {
  %t = (f32[3,8]{1,0}, f32[5,8]{1,0}, s32[]) parameter(0)
  %slot.3 = s32[] get-tuple-element(%t), index=2
  %other.1 = f32[5,8]{1,0} get-tuple-element(%t), index=1
  %made = f32[3,8]{1,0} conditional(%slot.3, %t, %t), branch_computations={%skip, %run}
  ROOT %next = (f32[3,8]{1,0}, f32[5,8]{1,0}, s32[]) tuple(%made, %other.1, %slot.3)
}

%more (m: (f32[3,8], f32[5,8], s32[])) -> pred[] {
  %m = (f32[3,8]{1,0}, f32[5,8]{1,0}, s32[]) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (begin: (f32[3,8], f32[5,8], s32[])) -> (f32[3,8], f32[5,8], s32[]) {
  %begin = (f32[3,8]{1,0}, f32[5,8]{1,0}, s32[]) parameter(0)
  ROOT %end = (f32[3,8]{1,0}, f32[5,8]{1,0}, s32[]) while(%begin), condition=%more, body=%tick
}
"""


def test_bytes_of_ring_buffers_are_counted():
    """Of the branch with more: both ways to write, and the slot that is given as it is."""
    assert count_rings(SLOTS, {(3, 8)}) == (2 * 32, 32)
    assert count_rings(SLOTS, {(5, 8)}) == (0, 32)
    only_doubled = SLOTS.replace("%both = (f32[8]{0}, f32[8]{0}) tuple(%whole, %twice)",
                                 "%both = (f32[8]{0}, f32[8]{0}) tuple(%twice, %twice)")  # fmt: skip
    assert count_rings(only_doubled, {(3, 8)}) == (2 * 32, 0)


APART = """
HloModule jit_step, is_scheduled=true

%first (f: (f32[1,8], f32[1,4], f32[8])) -> (f32[1,8], f32[1,4], f32[8]) {
  %f = (f32[1,8]{1,0}, f32[1,4]{1,0}, f32[8]{0}) parameter(0)
  %a = f32[1,8]{1,0} get-tuple-element(%f), index=0
  %b = f32[1,4]{1,0} get-tuple-element(%f), index=1
  %c = f32[8]{0} get-tuple-element(%f), index=2
  %copied = f32[1,4]{1,0} copy(%b)
  %no = s32[] constant(0)
  %one = f32[8]{0} conditional(%no, %c, %c), branch_computations={%same, %same}
  ROOT %g = (f32[1,8]{1,0}, f32[1,4]{1,0}, f32[8]{0}) tuple(%a, %copied, %one)
}

%same (s: f32[8]) -> f32[8] {
  ROOT %s = f32[8]{0} parameter(0)
}

%second (i: (f32[1,8], f32[1,4], f32[8])) -> (f32[1,8], f32[1,4], f32[8]) {
  %i = (f32[1,8]{1,0}, f32[1,4]{1,0}, f32[8]{0}) parameter(0)
  %d = f32[1,8]{1,0} get-tuple-element(%i), index=0
  %e = f32[1,4]{1,0} get-tuple-element(%i), index=1
  %h = f32[8]{0} get-tuple-element(%i), index=2
  %too = f32[1,8]{1,0} copy(%d)
  ROOT %j = (f32[1,8]{1,0}, f32[1,4]{1,0}, f32[8]{0}) tuple(%too, %e, %h)
}

%go (m: (f32[1,8], f32[1,4], f32[8])) -> pred[] {
  %m = (f32[1,8]{1,0}, f32[1,4]{1,0}, f32[8]{0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

%run (r: (f32[1,8], f32[1,4], f32[8])) -> (f32[1,8], f32[1,4], f32[8]) {
  %r = (f32[1,8]{1,0}, f32[1,4]{1,0}, f32[8]{0}) parameter(0)
  %k = (f32[1,8]{1,0}, f32[1,4]{1,0}, f32[8]{0}) while(%r), condition=%go, body=%first
  ROOT %l = (f32[1,8]{1,0}, f32[1,4]{1,0}, f32[8]{0}) while(%k), condition=%go, body=%second
}

%skip (q: (f32[1,8], f32[1,4], f32[8])) -> (f32[1,8], f32[1,4], f32[8]) {
  ROOT %q = (f32[1,8]{1,0}, f32[1,4]{1,0}, f32[8]{0}) parameter(0)
}

%tick (t: (f32[1,8], f32[1,4], f32[8])) -> (f32[1,8], f32[1,4], f32[8]) {
  %t = (f32[1,8]{1,0}, f32[1,4]{1,0}, f32[8]{0}) parameter(0)
  %p = s32[] constant(0)
  ROOT %n = (f32[1,8]{1,0}, f32[1,4]{1,0}, f32[8]{0}) conditional(%p, %t), branch_computations={%skip, %run}
}

ENTRY %main (begin: (f32[1,8], f32[1,4], f32[8])) -> (f32[1,8], f32[1,4], f32[8]) {
  %begin = (f32[1,8]{1,0}, f32[1,4]{1,0}, f32[8]{0}) parameter(0)
  ROOT %end = (f32[1,8]{1,0}, f32[1,4]{1,0}, f32[8]{0}) while(%begin), condition=%go, body=%tick
}
"""


def test_one_of_the_loops_for_each_slot_counts():
    """A loop with a conditional inside of the one over the ticks is not another one of these."""
    assert count_rings(APART, {(1, 8), (1, 4)}) == (32, 0)
    assert count_rings(APART, {(1, 4)}) == (16, 0)
    assert count_copies(APART) == {"f32[1, 8]": 32, "f32[1, 4]": 16}
