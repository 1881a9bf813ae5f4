"""Two starts of a toy run: the second one traces nothing, and both tell where the time went."""

import json

import pytest

from experiments.start_up import __main__ as start_up
from experiments.start_up.run import COLUMNS

TOY = [
    "model.num_blocks=1", "model.width=16", "model.num_heads=1", "model.ffn_width=16",
    "model.vocab_size=257", "model.sinkhorn_iterations=2", "data.sequence_length=16", "batch_size=2",
]  # fmt: skip


@pytest.mark.slow
def test_the_second_start_finds_every_program(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    output = tmp_path / "found.json"
    arguments = ["start_up", "--config", "small_cpu", "--arms", "mhc", "--output", str(output)]
    monkeypatch.setattr("sys.argv", [*arguments, "--set", *TOY])
    start_up.main()
    cold, second = json.loads(output.read_text())["rows"]
    # Initial state, train step, evaluation and gains are among them.
    assert len(cold["missed"]) >= 4
    assert second["missed"] == []
    # Not even traced: jax is asked for the rest alone.
    assert (cold["whole"], second["whole"]) == ("0 of 4", "4 of 4")
    assert second["trace"] + second["lower"] < 0.5
    assert len(second["hit"]) <= len(cold["missed"]) - 4
    assert not cold["warnings"] + second["warnings"]
    for row in (cold, second):
        parts = [row[name] for name in COLUMNS if name not in ("kept", "whole")]
        assert all(seconds >= 0 for seconds in parts)
        assert row["first_step"] > max(row["imports"] + row["run"], row["trace"], row["lower"])
    assert "| mhc, second |" in capsys.readouterr().out
