"""model_speed: FLOPs against the parameter table and by hand, groups of kernels, one run at toy size."""

import json
import pathlib
import re

import pytest

from configs import paper_3b
from experiments.model_speed import __main__ as model_speed
from experiments.model_speed import profile
from experiments.model_speed.flops import attention_flops, parameter_flops
from kernels_pallas import dispatch
from mhc_jax.config import from_dict
from mhc_jax.describe import count_parameters, sums

PACKAGE = pathlib.Path(dispatch.__file__).parent
TINY = """
from configs import paper_3b

def get_config(connection="mhc"):
    config = paper_3b.get_config(connection)
    config.model.update(vocab_size=512, num_blocks=2, width=32, num_heads=2, head_dim=8, rope_dim=4,
                        kv_rank=16, num_experts=4, experts_per_token=2, expert_width=16, loss_chunks=2)
    config.data.sequence_length = 16
    return config
"""


def test_flops_of_the_paper_model():
    model = from_dict(paper_3b.get_config("residual")).model
    whole = sums(count_parameters(model))
    assert parameter_flops(model) == 6 * whole.active == pytest.approx(6 * 609e6, rel=1e-3)
    # 12 blocks, 16 heads, 2048.5 keys on average; 192 products for a score, 128 for its share of v.
    forward = 12 * 16 * 2048.5 * 2 * (192 + 128)
    assert attention_flops(model, 4096) == pytest.approx(3 * forward)


def test_kernels_go_to_the_part_they_work_for():
    attention = "jit(train_step)/jvp()/while/body/checkpoint/attention_sublayer/dot_general"
    experts = "jit(train_step)/transpose(jvp())/while/body/ffn_sublayer/routed_experts/"
    for kernel, source, group in (
        ("nvjet_tst_128x256_64x4", attention, "attention: matmuls"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop", "", "attention kernel"),
        ("mosaic_gpu_ragged_dot_kernel", experts + "pallas_call", "expert matmuls"),
        ("sort_7", experts + "sort", "experts: the rest"),
        ("loop_multiply_fusion", "jit(train_step)/optimizer/mul", "optimizer: the rest"),
        ("mhc_boundary_backward", "jit(train_step)/jvp()/connection/call", "mHC kernels"),
        ("loop_dynamic_update_slice_fusion_3", "", "scan: stacking and slicing"),
        ("nvjet_hsh", "", "other matmuls"),
        ("MemcpyD2D", "", "copies"),
    ):
        assert profile.group_of(kernel, source) == group


def kernel_names():
    """What the kernels of every platform are called, from their sources."""
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        # Pallas: name="..." of a call, or names between which it chooses.
        yield from re.findall(r'\bname="(\w+)"', text)
        yield from re.findall(r'"(mhc_\w+?_(?:forward|backward)\w*)"', text)
        # Triton: the functions that they call have other names.
        yield from re.findall(r"@triton\.jit\ndef (mhc_\w+)\(", text)
    for path in PACKAGE.rglob("*.cu"):
        text = path.read_text()
        for entry in re.findall(r"__global__ void [^\n]*\n\s*(\w+)\(", text):
            yield from re.findall(rf"#define {entry} (\w+)", text) or [entry]


def test_kernels_of_all_platforms_have_one_naming_scheme():
    names = set(kernel_names())
    assert {"mhc_boundary_forward", "mhc_boundary_backward", "mhc_read_backward"} <= names
    assert len(names) >= 16
    for name in names:
        assert re.fullmatch(rf"mhc_({'|'.join(dispatch.OPS)})_(forward|backward)(_[a-z]+)?", name)
        # Also where a platform adds a number, and inside of any scope of the model.
        for source in ("", "jit(step)/transpose(jvp())/connection/shard_map/call"):
            assert profile.group_of(f"{name} {name}.3", source) == "mHC kernels"


def test_a_recorded_trace():
    recorded = json.loads(pathlib.Path(__file__).with_name("boundary_trace.json").read_text())
    events, source = [], "jit(step)/connection/add"
    for kernel, us in recorded["kernels"]:
        events.append(profile.Event(kernel, f"{kernel}.1", 0, us))
    op_names = {event.instruction: source for event in events}
    groups = profile.by_group(profile.rows(events, op_names, steps=1))
    # Of 2852 us; 40 are gaps, the rest are the rounding and the layout of phi.
    assert groups == {
        "mHC kernels": pytest.approx(2.7998),
        "connections: the rest": pytest.approx(0.0124),
    }


def test_times_of_events_are_summed():
    program = """
  %fusion.1 = f32[4]{0} fusion(%a), kind=kLoop, metadata={op_name="jit(f)/optimizer/mul" stack_frame_id=3}
  ROOT %gemm.2 = f32[4]{0} custom-call(%a), metadata={op_type="dot" op_name="jit(f)/unembedding/dot_general"}
"""
    op_names = profile.sources(program)
    assert op_names == {
        "fusion.1": "jit(f)/optimizer/mul",
        "gemm.2": "jit(f)/unembedding/dot_general",
    }
    events = [
        profile.Event("nvjet", "gemm.2", 0, 3000),
        # Inside of a CUDA graph: known by its name alone; and beside the other.
        profile.Event("fusion_1", "command_buffer.3", 1000, 4000),
        profile.Event("nvjet", "gemm.2", 6000, 7000),
    ]
    assert profile.busy_ms(events) == 5
    rows = profile.rows(events, op_names, steps=2)
    assert [(row.group, row.count, row.ms) for row in rows] == [
        ("unembedding and loss: matmuls", 1, 2),
        ("optimizer: the rest", 0.5, 1.5),
    ]
    assert "40.0%" in profile.report(rows, 5, 2.5)


@pytest.mark.slow
def test_a_run_at_toy_size(tmp_path, capsys):
    config, output = tmp_path / "tiny.py", tmp_path / "out" / "speed.json"
    config.write_text(TINY)
    model_speed.main(
        ["--config", f"{config}:residual", "--batch_size", "2", "--num_steps", "2", "--profile"]
        + ["--scan_blocks", "--output", str(output)]
    )
    printed = capsys.readouterr().out
    assert "tiny:residual b2 mhc scan" in printed
    assert "no MFU: the peak of 'cpu'" in printed
    assert "unembedding and loss" in printed
    result = json.loads(output.read_text())["arms"][0]
    assert len(result["ms"]) == model_speed.ROUNDS
    assert result["tokens_per_second"] == pytest.approx(
        32e3 / (sum(result["ms"]) / 2), rel=0.01, abs=1
    )
    assert result["profile"]["groups_ms"]


def test_blocks_are_written_out_unless_asked_otherwise():
    for arguments, scans in (([], False), (["--scan_blocks"], True), (["--no-scan_blocks"], False)):
        options = model_speed.parse_arguments(["--num_steps=1", *arguments])
        for name in ("paper_3b", "small_30m"):
            arm = model_speed.Arm(f"configs/{name}.py", options, 4, None)
            assert arm.config.model.scan_blocks == arm.result["scan_blocks"] == scans
            assert arm.name.split()[-1] == ("scan" if scans else "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "configs/none.py"], "there is no file"),
        (["--config", "configs/paper_3b.py:other"], "no variant"),
        (["--config", "configs/paper_3b.py", "--remat", "some"], "model.remat='some'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(SystemExit, match=message):
        model_speed.main(arguments)
