"""Bytes between HBM and a chip that pod_plan counts for one instruction, each by hand."""

import pytest

from experiments.pod_plan.hlo import Program

PEAKS = dict.fromkeys(("flops_per_second", "bytes_per_second", "link_bytes_per_second"), 1e9)
STACK, ROW = "f32[5,64,128]", "f32[1,64,128]"
WHOLE, PIECE = 5 * 64 * 128 * 4, 64 * 128 * 4
INDEX = 4

# A row of a stack is added to and written back; what the body of a scan does with a stacked gradient.
UPDATE = """
%update (stack: f32[5,64,128], row: f32[64,128], at: s32[]) -> f32[5,64,128] {
  %stack = f32[5,64,128] parameter(0)
  %row = f32[64,128] parameter(1)
  %at = s32[] parameter(2)
  %zero = s32[] constant(0)
  %old = f32[1,64,128] dynamic-slice(%stack, %at, %zero, %zero)
  %row.1 = f32[1,64,128] bitcast(%row)
  %new = f32[1,64,128] add(%old, %row.1)
  ROOT %written = f32[5,64,128] dynamic-update-slice(%stack, %new, %at, %zero, %zero)
}
"""

# AdamW of one matrix: two moments and the parameter are read and written, the gradient is read.
ADAMW = """
%adamw (p: f32[64,128], m: f32[64,128], v: f32[64,128], g: bf16[64,128]) -> (f32[64,128]) {
  %p = f32[64,128] parameter(0)
  %m = f32[64,128] parameter(1)
  %v = f32[64,128] parameter(2)
  %g = bf16[64,128] parameter(3)
  %g.1 = f32[64,128] convert(%g)
  %m.1 = f32[64,128] add(%m, %g.1)
  %v.1 = f32[64,128] multiply(%v, %g.1)
  %p.1 = f32[64,128] subtract(%p, %m.1)
  ROOT %all = (f32[64,128], f32[64,128], f32[64,128]) tuple(%p.1, %m.1, %v.1)
}
"""

# Two results, of which one updates a stack behind a bitcast.
BOTH = """
%both (stack: bf16[5,8192], row: f32[64,128], at: s32[]) -> (f32[64,128], bf16[5,64,128]) {
  %stack = bf16[5,8192] parameter(0)
  %row = f32[64,128] parameter(1)
  %at = s32[] parameter(2)
  %zero = s32[] constant(0)
  %twice = f32[64,128] add(%row, %row)
  %narrow = bf16[64,128] convert(%twice)
  %flat = bf16[1,8192] bitcast(%narrow)
  %written = bf16[5,8192] dynamic-update-slice(%stack, %flat, %at, %zero)
  %shaped = bf16[5,64,128] bitcast(%written)
  ROOT %pair = (f32[64,128], bf16[5,64,128]) tuple(%twice, %shaped)
}
"""


def count(
    lines, computations="", parameters=("x: f32[64,128]", "stack: f32[5,64,128]", "at: s32[]")
):
    """Bytes of a program whose entry has these parameters and lines."""
    names = [parameter.split(":")[0] for parameter in parameters]
    types = [parameter.split(": ")[1] for parameter in parameters]
    declared = "".join(
        f"  %{name} = {type_} parameter({k})\n" for k, (name, type_) in enumerate(zip(names, types))
    )
    text = f"{computations}\nENTRY %main ({', '.join(parameters)}) -> f32[] {{\n{declared}{lines}\n}}\n"
    return Program(text, **PEAKS).costs().bytes


@pytest.mark.parametrize(
    ("line", "computations", "want"),
    [
        # The stack is neither read nor written as a whole.
        (f"ROOT %r = {STACK} fusion(%stack, %x, %at), kind=kLoop, calls=%update", UPDATE,
         PIECE + PIECE + INDEX + PIECE),
        (f"ROOT %r = {ROW} dynamic-slice(%stack, %at, %at, %at)", "", 2 * PIECE),
        (f"ROOT %r = {STACK} dynamic-update-slice(%stack, %x, %at, %at, %at)", "", 2 * PIECE),
        ("ROOT %r = f32[64,128] add(%x, %x)", "", 3 * PIECE),
        ("ROOT %r = f32[64,128] copy(%x)", "", 2 * PIECE),
        # On the chip already, and the result stays there.
        ("%a = f32[64,128]{1,0:S(1)} copy(%x)\n  ROOT %r = f32[64,128]{1,0:S(1)} add(%a, %a)", "", PIECE),
        ("ROOT %r = f32[8192] bitcast(%x)", "", 0),
    ],
    ids=["fused update", "slice", "update", "add", "copy", "on the chip", "bitcast"],
)  # fmt: skip
def test_bytes_of_an_instruction(line, computations, want):
    assert count("  " + line, computations) == want


def test_bytes_of_a_fused_optimizer():
    types = ("f32[64,128]", "f32[64,128]", "f32[64,128]", "bf16[64,128]")
    parameters = [f"{name}: {type_}" for name, type_ in zip("pmvg", types)]
    result = "(f32[64,128], f32[64,128], f32[64,128])"
    line = f"  ROOT %r = {result} fusion(%p, %m, %v, %g), kind=kLoop, calls=%adamw"
    assert count(line, ADAMW, parameters) == 6 * PIECE + PIECE // 2


def test_bytes_of_a_fused_update_beside_another_result():
    parameters = ["x: f32[64,128]", "stack: bf16[5,8192]", "at: s32[]"]
    line = (
        "  ROOT %r = (f32[64,128], bf16[5,64,128]) fusion(%stack, %x, %at), kind=kLoop, calls=%both"
    )
    assert count(line, BOTH, parameters) == PIECE + INDEX + PIECE + PIECE // 2


def test_a_fusion_that_reads_the_whole_stack_too_counts_it():
    whole = UPDATE.replace(
        "  %new = f32[1,64,128] add(%old, %row.1)",
        "  %all = f32[5,64,128] negate(%stack)\n"
        "  %first = f32[1,64,128] slice(%all), slice={[0:1], [0:64], [0:128]}\n"
        "  %new = f32[1,64,128] add(%old, %first)",
    )
    line = f"  ROOT %r = {STACK} fusion(%stack, %x, %at), kind=kLoop, calls=%update"
    # The row has no user left but a bitcast, and is not read.
    assert count(line, whole) == WHOLE + INDEX + PIECE


def test_a_scan_counts_its_updates_once_a_turn():
    loop = (
        UPDATE
        + """
%body (s: (s32[], f32[64,128], f32[5,64,128])) -> (s32[], f32[64,128], f32[5,64,128]) {
  %s = (s32[], f32[64,128], f32[5,64,128]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x.1 = f32[64,128] get-tuple-element(%s), index=1
  %stack.1 = f32[5,64,128] get-tuple-element(%s), index=2
  %n = f32[5,64,128] fusion(%stack.1, %x.1, %i), kind=kLoop, calls=%update
  ROOT %t = (s32[], f32[64,128], f32[5,64,128]) tuple(%i, %x.1, %n)
}

%condition (s.1: (s32[], f32[64,128], f32[5,64,128])) -> pred[] {
  %s.1 = (s32[], f32[64,128], f32[5,64,128]) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}
"""
    )
    state = "(s32[], f32[64,128], f32[5,64,128])"
    lines = (
        f"  %t.1 = {state} tuple(%at, %x, %stack)\n"
        f"  ROOT %r = {state} while(%t.1), condition=%condition, body=%body"
    )
    assert count(lines, loop) == 5 * (3 * PIECE + INDEX)
