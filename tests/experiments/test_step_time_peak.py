"""The tensors at a step's peak, read from a dump of the compiler."""

import pytest

LIVE = """HloLiveRange (max 576):
  BufferLiveRange:
    state_params__unembed____kernel__.1{}:0-528
  Live ranges at 284 (peak):
    kernel.1{0}: 335544320 bytes (cumulative: 335544320 bytes)
    kernel.2{0}: 335544320 bytes (cumulative: 671088640 bytes)
    state_opt_state_1__0__mu.1{}: 52428800 bytes (cumulative: 723517440 bytes)
    fusion{}: 1024 bytes (cumulative: 723518464 bytes)
"""
OPERATION = "custom-call(%x), metadata={op_name="
KERNEL = f'{OPERATION}"jit(train_step)/jvp(jit(block))/connection/cond/branch_0_fun/ffi_call"}}'
PROGRAM = f"""ENTRY %main {{
  %kernel.1 = (bf16[16384,10240]{{1,0}}, f32[2,28]{{1,0}}) {KERNEL}
  %kernel.2 = (bf16[16384,10240]{{1,0}}, f32[2,28]{{1,0}}) {KERNEL}
  ROOT %fusion = f32[256]{{0}} {OPERATION}"jit(train_step)/transpose(jvp(jit(block)))/ffn/mul;other"}}
}}
"""


@pytest.fixture
def peak(monkeypatch):
    import os

    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))  # the import adds to it
    from experiments.step_time import peak

    return peak


def test_equal_tensors_are_counted_and_small_ones_added_up(peak, tmp_path):
    name = "module_0001.jit_train_step.gpu_after_optimizations"
    (tmp_path / f"{name}-live-range.txt").write_text(LIVE)
    (tmp_path / f"{name}.txt").write_text(PROGRAM)
    tensors = peak.at_peak(tmp_path)
    assert [(t.source, t.shape) for t in tensors] == [
        ("forward: connection/ffi_call", "bf16[16384,10240]"),
        ("forward: connection/ffi_call", "bf16[16384,10240]"),
        ("optimizer state", "?"),
        ("backward: ffn/mul", "f32[256]"),
    ]
    header, streams, state, rest, together = peak.table({"mhc": tensors, "residual": tensors[2:]})
    assert header == ["made by", "shape", "MiB", "mhc", "residual"]
    assert streams[2:] == ["320", "2: 0.62 GiB", ""]
    assert state[2:] == ["50", "1: 0.05 GiB", "1: 0.05 GiB"]
    assert rest[3:] == ["0.00 GiB", "0.00 GiB"]
    assert together[3:] == ["0.67 GiB", "0.05 GiB"]


def test_a_compiler_that_does_not_say_it_is_named(peak, tmp_path):
    with pytest.raises(ValueError, match="does not say what is alive at the peak"):
        peak.at_peak(tmp_path)
