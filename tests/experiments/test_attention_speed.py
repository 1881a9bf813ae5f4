"""attention_speed at toy size: arms that run here agree, one that cannot says why."""

import json

import pytest

from experiments.attention_speed import __main__ as attention_speed


def test_a_run_at_toy_size(tmp_path, capsys):
    output = tmp_path / "out" / "attention.json"
    attention_speed.main(
        ["--heads", "2", "--batch_size", "1", "--sequence_length", "32", "--key_width", "24"]
        + ["--value_width", "16", "--repeats", "2", "--output", str(output)]
    )
    fused, *cudnn, plain = json.loads(output.read_text())["rows"]
    printed = capsys.readouterr().out
    assert len(cudnn) == 2
    assert all(arm["failed"] in printed for arm in cudnn)
    assert fused["largest_difference"] == 0
    assert plain["largest_difference"] < 0.05  # bfloat16 of entries of size 3
    # 2 heads x 528 seen pairs x 2 x (24 + 16)
    assert fused["forward_tflops"] * fused["forward_ms"] * 1e9 == pytest.approx(2 * 528 * 80)
