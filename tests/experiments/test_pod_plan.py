"""pod_plan: counting HLO by hand, meshes that divide, and the compiler where libtpu is installed."""

import math
import os
import pathlib
import subprocess
import sys

import pytest

from experiments.hardware import CHIPS
from experiments.pod_plan.chips import chip_of, more_shares, pick_mesh
from experiments.pod_plan.flops import attention_flops, convolution_flops
from experiments.pod_plan.hlo import Program
from experiments.pod_plan.text import parse

ROOT = pathlib.Path(__file__).parents[2]

# A scan over 5 blocks of a stack [5, 64, 128] with one product each, parameters gathered in the foreground,
# an all-reduce that becomes a reduce-scatter, and one all-reduce in the background.
PROGRAM = """
HloModule jit_step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%all-reduce-scatter (input: f32[256,128]) -> f32[64,128] {
  %input = f32[256,128]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[256,128]{1,0} all-reduce(%input), replica_groups={{0,1,2,3}}, to_apply=%sum
  %zero = s32[] constant(0)
  ROOT %dynamic-slice.1 = f32[64,128]{1,0} dynamic-slice(%all-reduce.1, %zero, %zero)
}

%slice_of_stack (stack: bf16[5,64,128], index: s32[]) -> bf16[64,128] {
  %stack = bf16[5,64,128]{2,1,0} parameter(0)
  %index = s32[] parameter(1)
  %zero.1 = s32[] constant(0)
  %dynamic-slice.2 = bf16[1,64,128]{2,1,0} dynamic-slice(%stack, %index, %zero.1, %zero.1)
  ROOT %bitcast.2 = bf16[64,128]{1,0} bitcast(%dynamic-slice.2)
}

%body (state: (s32[], bf16[32,256], bf16[5,64,128])) -> (s32[], bf16[32,256], bf16[5,64,128]) {
  %state = (s32[], bf16[32,256]{1,0}, bf16[5,64,128]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = bf16[32,256]{1,0} get-tuple-element(%state), index=1
  %w = bf16[5,64,128]{2,1,0} get-tuple-element(%state), index=2
  %mine = bf16[64,128]{1,0} fusion(%w, %i), kind=kLoop, calls=%slice_of_stack
  %whole = bf16[256,128]{1,0:S(1)} all-gather(%mine), replica_groups={{0,1,2,3}}, dimensions={0}
  %y = bf16[32,128]{1,0:S(1)} dot(%x, %whole), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %next = (s32[], bf16[32,256]{1,0}, bf16[5,64,128]{2,1,0}) tuple(%i, %x, %w)
}

%condition (state.1: (s32[], bf16[32,256], bf16[5,64,128])) -> pred[] {
  %state.1 = (s32[], bf16[32,256]{1,0}, bf16[5,64,128]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %limit = s32[]{:T(128)} constant(5)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (p0: bf16[32,256], p1: bf16[5,64,128], p2: f32[256,128]) -> f32[64,128] {
  %p0 = bf16[32,256]{1,0} parameter(0)
  %p1 = bf16[5,64,128]{2,1,0} parameter(1)
  %p2 = f32[256,128]{1,0} parameter(2)
  %start = s32[] constant(0)
  %initial = (s32[], bf16[32,256]{1,0}, bf16[5,64,128]{2,1,0}) tuple(%start, %p0, %p1)
  %loop = (s32[], bf16[32,256]{1,0}, bf16[5,64,128]{2,1,0}) while(%initial), condition=%condition, body=%body
  %all-reduce-start.3 = f32[256,128]{1,0} all-reduce-start(%p2), replica_groups={{0,1,2,3}}, to_apply=%sum
  %all-reduce-done.3 = f32[256,128]{1,0} all-reduce-done(%all-reduce-start.3)
  ROOT %share = f32[64,128]{1,0} fusion(%all-reduce-done.3), kind=kCustom, calls=%all-reduce-scatter
}
"""


def test_counts_of_a_small_program():
    peaks = {"flops_per_second": 1e9, "bytes_per_second": 1e9, "link_bytes_per_second": 1e6}
    costs = Program(PROGRAM, **peaks).costs()
    assert costs.flops == 5 * 2 * 32 * 256 * 128
    piece, whole = 64 * 128, 256 * 128
    # In the loop: index and slice read, slice written, the piece read by the gather, x read by the product
    # (the gathered matrix and y are on the chip). After it: both reductions read and write float32.
    in_loop = 4 + 2 * (2 * piece + piece + 32 * 256)
    assert costs.bytes == 5 * in_loop + 4 * 2 * whole + 4 * (whole + piece)
    kinds = {k: (c.count, c.bytes, c.async_bytes) for k, c in costs.collectives.items()}
    assert kinds == {
        "all-gather": (5, 5 * 2 * whole, 0),
        "all-reduce": (1, 4 * whole, 4 * whole),
        "reduce-scatter": (1, 4 * whole, 0),
    }
    # Nothing is computed beside the loop, so that the background hides nothing there.
    assert costs.seconds_background == pytest.approx(2 * 4 * whole / 1e6)
    assert costs.seconds_waiting == pytest.approx((5 * 2 * whole + 4 * whole + 2 * 4 * whole) / 1e6)
    assert costs.unknown_loops == 0


# One gather in the background: begun, carried on by two products, ended. Only the products' own arrays are
# read and written by them.
BACKGROUND = """
%start (s: bf16[64,128]) -> bf16[256,128] {
  %s = bf16[64,128] parameter(0)
  %all-gather.1 = bf16[256,128] all-gather(%s), channel_id=7, dimensions={0}
  ROOT %begin = (bf16[64,128], bf16[256,128]) custom-call(%s, %all-gather.1), custom_call_target="x"
}

%async_collective_fusion (s.1: bf16[64,128], b.1: bf16[256,128], x.1: bf16[512,512]) -> bf16[512,512] {
  %s.1 = bf16[64,128] parameter(0)
  %b.1 = bf16[256,128] parameter(1)
  %x.1 = bf16[512,512] parameter(2)
  %y.1 = bf16[512,512] dot(%x.1, %x.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %all-gather.2 = bf16[256,128] all-gather(%s.1), channel_id=7, dimensions={0}
  ROOT %t.1 = (bf16[512,512], bf16[64,128], bf16[256,128]) tuple(%y.1, %s.1, %all-gather.2)
}

ENTRY %main (p: bf16[64,128], x: bf16[512,512]) -> bf16[256,128] {
  %p = bf16[64,128] parameter(0)
  %x = bf16[512,512] parameter(1)
  %async-collective-start = (bf16[64,128], bf16[256,128]) fusion(%p), kind=kCustom, calls=%start
  %s.0 = bf16[64,128] get-tuple-element(%async-collective-start), index=0
  %b.0 = bf16[256,128] get-tuple-element(%async-collective-start), index=1
  %f.1 = (bf16[512,512], bf16[64,128], bf16[256,128]) fusion(%s.0, %b.0, %x), calls=%async_collective_fusion
  %b.2 = bf16[256,128] get-tuple-element(%f.1), index=2
  %f.2 = (bf16[512,512], bf16[64,128], bf16[256,128]) fusion(%s.0, %b.2, %x), calls=%async_collective_fusion
  %b.3 = bf16[256,128] get-tuple-element(%f.2), index=2
  ROOT %async-collective-done = bf16[256,128] fusion(%s.0, %b.3), kind=kCustom, calls=%start
}
"""


@pytest.mark.parametrize("link", [1e9, 1e4])
def test_a_transfer_carried_on_by_several_products_counts_once(link):
    peaks = {"flops_per_second": 1e9, "bytes_per_second": 1e9, "link_bytes_per_second": link}
    costs = Program(BACKGROUND, **peaks).costs()
    assert costs.flops == 2 * 2 * 512**3
    whole = 2 * 256 * 128
    gather = costs.collectives["all-gather"]
    assert (gather.count, gather.bytes, gather.async_bytes) == (1, whole, whole)
    assert costs.bytes == 2 * (2 * 2 * 512 * 512) + whole / 4 + whole
    assert costs.seconds_compute == pytest.approx(costs.flops / 1e9)
    # What the products of the same computation do not cover is waited for.
    hidden = min(whole / link, costs.seconds_compute)
    assert costs.seconds_waiting == pytest.approx(whole / link - hidden)


def test_a_loop_without_a_limit_is_reported():
    text = PROGRAM.replace("constant(5)", "parameter(1)")
    peaks = dict.fromkeys(("flops_per_second", "bytes_per_second", "link_bytes_per_second"), 1e9)
    costs = Program(text, **peaks).costs()
    assert costs.unknown_loops == 1
    assert costs.flops == 2 * 32 * 256 * 128


@pytest.mark.parametrize(
    ("out", "lhs", "rhs", "attributes", "flops"),
    [
        # [B S, C] x [C, 3H, D]: most taps of the window fall into the padding
        ("bf16[2,1024,24,128]", "bf16[2,1024,1024,1]", "bf16[24,128,1024,1]",
         "window={size=1x24 pad=0_0x23_23 rhs_reversal=0x1}, dim_labels=0bf1_1oi0->0b1f",
         2 * 2 * 1024 * 1024 * 24 * 128),
        # batch [2, 8] of [128, S] x [S, S]: batch dimensions as windows with holes
        ("bf16[2,8,128,1024]", "bf16[2,1024,24,128]", "bf16[2,8,1024,1024]",
         "window={size=2x8 stride=1x7 pad=0_0x-128_0 lhs_dilate=2x8}, dim_labels=0f1b_01oi->01bf",
         2 * 2 * 8 * 128 * 1024 * 1024),
        ("bf16[2,1024,4096]", "bf16[2,1024,512]", "bf16[512,4096,1]",
         "window={size=1}, dim_labels=0bf_io0->0bf", 2 * 2 * 1024 * 512 * 4096),
    ],
)  # fmt: skip
def test_products_that_a_tpu_writes_as_convolutions(out, lhs, rhs, attributes, flops):
    computations, _ = parse(
        f"ENTRY %main (l: {lhs}) -> {out} {{\n  %l = {lhs} parameter(0)\n  %r = {rhs} parameter(1)\n"
        f"  ROOT %c = {out} convolution(%l, %r), {attributes}\n}}"
    )
    assert convolution_flops(computations["main"]["c"], lhs, rhs) == flops


@pytest.mark.parametrize(
    ("kernel", "per_pair"),
    [("splash_mha_fwd_residuals.3", 320), ("splash_mha_dq_no_residuals.2", 512),
     ("splash_mha_dkv_no_residuals", 640)],
)  # fmt: skip
def test_flops_of_causal_attention(kernel, per_pair):
    wide, values = "bf16[5,16,4096,192]", "bf16[5,16,4096,128]"
    types = ["s8[1,8,8]", "s8[1,8,8]", wide, wide, values, "s32[4096,128]"]
    parameters = "\n".join(f"  %p{i} = {t} parameter({i})" for i, t in enumerate(types))
    names = ", ".join(f"%p{i}" for i in range(len(types)))
    computations, _ = parse(
        f"ENTRY %main (p: f32[]) -> {values} {{\n{parameters}\n"
        f"  ROOT %{kernel} = {values} custom-call({names}), custom_call_target=x\n}}"
    )
    found = attention_flops(computations["main"][kernel], types)
    assert found == 5 * 16 * 2 * (4096**2 / 2) * per_pair


@pytest.mark.parametrize("num_devices", [1, 4, 24, 64, 256, 512])
@pytest.mark.parametrize(("batch", "experts"), [(320, 64), (512, 64), (1280, 72), (640, 0)])
@pytest.mark.parametrize("capacity", [False, True])
def test_picked_meshes_divide_everything(num_devices, batch, experts, capacity):
    mesh = pick_mesh(
        num_devices,
        batch_parts=batch,
        num_experts=experts if capacity else 0,
        rows=128,
        sequence_length=4096,
        num_heads=24,
    )
    assert 128 % (8 * mesh["fsdp"]) == 0
    assert math.prod(mesh.values()) == num_devices
    assert batch % (mesh["data"] * mesh["fsdp"] * mesh["expert"]) == 0
    assert 4096 % mesh["sequence"] == 0
    assert 24 % mesh["tensor"] == 0
    assert experts % mesh["expert"] == 0


def test_meshes_with_more_shares():
    first = {"pipe": 1, "data": 16, "fsdp": 4, "expert": 1, "tensor": 2, "sequence": 1}
    found = list(more_shares(first, rows=48))
    # 48 rows are split at most 16 ways.
    assert [(mesh["data"], mesh["fsdp"]) for mesh in found] == [(16, 4), (8, 8)]
    assert all(mesh | {"data": 16, "fsdp": 4} == first for mesh in found)
    assert list(more_shares(first | {"data": 3}, rows=48)) == [first | {"data": 3}]


def test_no_mesh_divides():
    with pytest.raises(ValueError, match="no mesh of 7 devices divides 320 sequences"):
        pick_mesh(7, batch_parts=320, num_experts=0, rows=128, sequence_length=4096, num_heads=16)


def test_unknown_chips_are_named():
    assert chip_of("v5p:8x8x8") is CHIPS["v5p"]
    with pytest.raises(ValueError, match="v9:2x2 is unknown: use KIND:SHAPE with KIND one of v5e"):
        chip_of("v9:2x2")


TINY = {
    "model.num_blocks": 1, "model.width": 128, "model.num_heads": 1, "model.ffn_width": 128,
    "model.connection": "residual", "batch_size": 4, "data.sequence_length": 128,
}  # fmt: skip


@pytest.mark.tpu_compiler
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--topology=v6e:2x2"], 0, "fits: yes"),
        (["--topology=v6e:3x17"], 1, "--topology=v6e:3x17 is unknown to libtpu"),
        (["--topology=v6e:2x2", "--mesh=fsdp=3"], 1, "does not multiply out to the 4 devices"),
        (["--topology=v6e:2x2", "--mesh=rows=4"], 1, "'rows=4' is not AXIS=SIZE"),
    ],
)
def test_command(arguments, code, message):
    fields = [f"--config.{name}={value}" for name, value in TINY.items()]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.pod_plan", "--config=configs/default.py", *fields, *arguments],
        cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr[-2000:]
    assert message in done.stdout + done.stderr
    if code == 0:  # progress, and no alarm of libtpu's
        progress = done.stderr.splitlines()
        assert progress[0] == "... residual: tracing and lowering the train step"
        assert all(line.startswith("... ") for line in progress), done.stderr
        assert " us a step" in done.stdout
