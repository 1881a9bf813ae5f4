"""expert_tiles at toy size: no kernel runs here, which it says; candidates that do are compared."""

import jax.numpy as jnp
import pytest

from experiments import expert_tiles
from mhc_jax.moe.grouped_matmul import Tiles


def test_a_kernel_that_cannot_run_says_why(capsys):
    expert_tiles.main(
        ["--rows", "64", "--width", "128", "--expert_width", "128", "--num_experts", "2"]
        + ["--repeats", "1"]
    )
    printed = capsys.readouterr().out
    assert printed.count("1 tiles: 1 did not run, 0 gave another result") == 6
    assert "dense" in printed


def test_products_multiply_what_the_layer_does():
    options = expert_tiles.parse_arguments(["--rows", "8", "--num_experts", "2"])
    found = expert_tiles.products(options)
    widths = {name: [a.shape[-1] for a in arrays] for name, (_, arrays, _) in found.items()}
    assert widths == {
        "x gate_up": [1280, 1792], "hidden down": [896, 1280], "d gate_up^T": [1792, 1792],
        "d down^T": [1280, 1280], "x^T d": [1280, 1792], "hidden^T d": [896, 1280],
    }  # fmt: skip


def test_difference_is_relative_to_the_largest_entry():
    def product(x, y, tiles):
        return x * y + tiles.block_m

    x, y = jnp.full(3, 2.0), jnp.full(3, 5.0)
    expected = expert_tiles.measure(product, (x, y), Tiles(block_m=0), None, 1)[1]
    row, _ = expert_tiles.measure(product, (x, y), Tiles(block_m=1), expected, 1)
    assert row["difference"] == pytest.approx(0.1)
    assert row["ms"] > 0
