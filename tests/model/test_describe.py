"""Sizes of the paper's models against the closed form of Table 5, and the command that prints them."""

import importlib
import os
import pathlib
import subprocess
import sys

import pytest

from configs import paper_3b
from mhc_jax.config import CONNECTIONS, from_dict
from mhc_jax.describe import count_parameters, describe, sums

# Blocks, width, heads, experts and their width (Table 5); total and active in billions as it has them.
TABLE_5 = {
    "paper_3b": (12, 1280, 16, 64, 896, 2.97, 0.612),
    "paper_9b": (18, 1920, 24, 64, 1280, 9.18, 1.66),
    "paper_27b": (30, 2560, 32, 72, 1536, 27.0, 4.14),
    "paper_3b_1t": (12, 1280, 16, 64, 896, 2.97, 0.612),
}


def config_of(name, connection="mhc", **overrides):
    values = importlib.import_module(f"configs.{name}").get_config(connection)
    values.update_from_flattened_dict(overrides)
    return from_dict(values)


def closed_form(blocks, width, heads, experts, expert_width, connection):
    """(total, active) of DeepSeek-V3's layers, 6 + 2 experts a token, one leading dense block."""
    vocabulary = 129280 * width
    attention = width * heads * 192 + width * 576 + 512 + 512 * heads * 256 + 128 * heads * width
    per_sublayer = {
        "residual": 0,
        "hc": 6 * width + 3 + 24,
        "mhc": 4 * width * 24 + 3 + 24,
    }[connection]
    expert = 3 * width * expert_width
    shared_by_all = blocks * (attention + 2 * per_sublayer + 2 * width) + width
    shared_by_all += vocabulary + 8 * expert + (blocks - 1) * (width * experts + 2 * expert)
    return (
        vocabulary + shared_by_all + (blocks - 1) * experts * expert,
        shared_by_all + (blocks - 1) * 6 * expert,
    )


@pytest.mark.parametrize("connection", CONNECTIONS)
@pytest.mark.parametrize("name", [name for name in TABLE_5 if name != "paper_3b_1t"])
def test_parameters_are_those_of_table_5(name, connection):
    *sizes, total, active = TABLE_5[name]
    got = sums(count_parameters(config_of(name, connection).model))
    assert got == closed_form(*sizes, connection)
    if connection == "mhc":
        assert f"{got.total / 1e9:.3g}" == f"{total:.3g}"
        assert f"{got.active / 1e9:.3g}" == f"{active:.3g}"


def test_tied_embedding_is_active():
    plain = sums(count_parameters(config_of("small_30m").model))
    tied = sums(count_parameters(config_of("small_30m", **{"model.tie_embeddings": True}).model))
    assert plain.total - tied.total == 256 * 512
    assert plain.active == tied.active


def test_table_5_of_the_training():
    """Base rate, steps, sequences and the tokens that Table 5 makes of them."""
    want = {
        "paper_3b": (8.6e-4, 30000, 320, "39.3B"),
        "paper_9b": (5.9e-4, 50000, 512, "105B"),
        "paper_27b": (4.0e-4, 50000, 1280, "262B"),
        "paper_3b_1t": (9.0e-4, 100000, 2560, "1.05T"),
    }
    for name, (rate, steps, batch_size, tokens) in want.items():
        config = config_of(name)
        optimizer = config.optimizer
        assert (optimizer.learning_rate, config.steps, config.batch_size) == (
            rate,
            steps,
            batch_size,
        )
        assert (optimizer.b1, optimizer.b2, optimizer.eps) == (0.9, 0.95, 1e-20)
        assert (optimizer.weight_decay, optimizer.warmup_steps) == (0.1, 2000)
        assert (optimizer.schedule, config.model.norm_eps) == ("step", 1e-20)
        if name != "paper_3b":
            assert config.data == config_of("paper_3b").data
        if name != "paper_3b_1t":
            assert f"{tokens} tokens" in describe(config)


def test_unknown_arm():
    with pytest.raises(ValueError, match=r":hcc is no variant: use one of :residual, :hc, :mhc"):
        paper_3b.get_config("hcc")


def test_the_command_needs_no_workdir():
    command = [sys.executable, "-m", "mhc_jax.main", "--config=configs/paper_27b.py:residual"]
    done = subprocess.run(
        [*command, "--describe"],
        capture_output=True,
        text=True,
        check=True,
        cwd=pathlib.Path(__file__).parents[2],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert "4.12B" in done.stdout
    assert "connections" not in done.stdout
