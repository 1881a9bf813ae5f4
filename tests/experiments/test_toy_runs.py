"""Experiments that measure on an accelerator, run once at toy size: their tables and files add up."""

import inspect
import json
import os
import statistics
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import cli, record
from experiments.moe_speed import __main__ as moe_speed
from experiments.recompute import __main__ as recompute
from experiments.recompute import step_time as recompute_step_time
from experiments.step_time import __main__ as step_time
from mhc_jax.config import Config
from mhc_jax.train_step import abstract_state

# It sets flags of XLA when it is imported, which other tests' programs would inherit.
with pytest.MonkeyPatch.context() as _patch:
    _patch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])
    from experiments.scaling import __main__ as scaling

    SCALING_FLAGS = os.environ["XLA_FLAGS"]

SIZES = {
    "num_blocks": 1, "width": 128, "ffn_width": 16, "vocab_size": 32, "batch_size": 2, "sequence_length": 8,
}  # fmt: skip


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """`run(module, *flags)`: its command line; what the file has, and what was printed."""
    for module in (step_time, scaling):
        for name, value in (("WARMUP", 1), ("TIMED", 2)):
            monkeypatch.setattr(module, name, value)

    def call(module, *flags):
        output = tmp_path / "new" / "result.json"
        monkeypatch.setattr("sys.argv", ["x", *flags, "--output", str(output)])
        module.main()
        return json.loads(output.read_text()), capsys.readouterr().out

    return call


@pytest.fixture
def short_steps(monkeypatch):
    """Train steps that do next to nothing: compiling true ones of every arm would take minutes.

    They are called as the true ones are, and have to be given what those take.
    """

    def zeros(config):
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract_state(config))

    def step(state, batch):
        return state.replace(step=state.step + 1), {"train/loss": jnp.mean(batch["inputs"] * 1.0)}

    def like(true, made):
        def call(*args):
            config = inspect.signature(true).bind(*args).arguments["config"]
            assert isinstance(config, Config)
            return made(config)

        return call

    for module, name, made in (
        (step_time, "init_state", zeros),
        (step_time, "jit_train_step", lambda _: jax.jit(step, donate_argnums=0)),
        (scaling, "jit_init_state", lambda config: jax.jit(lambda: zeros(config))),
        (scaling, "jit_train_step", lambda _: jax.jit(step, donate_argnums=0)),
    ):
        monkeypatch.setattr(module, name, like(getattr(module, name), made))


def flags(sizes):
    return [f"--{name}={value}" for name, value in sizes.items()]


def over(arm, base):
    """Percent of the mean of two rounds, which are rounded to 0.01 ms, and a bound on what that changes."""
    ours, theirs = (statistics.mean(row["ms"]) for row in (arm, base))
    percent = 100 * (ours / theirs - 1)
    return pytest.approx(percent, abs=0.05 + 100 * (0.01 / theirs) * (1 + ours / theirs))


def check_step_time(result, printed, arms):
    rows = result["arms"]
    assert result["shape"] == SIZES
    assert [(r["connection"], r["implementation"], r["scan_blocks"]) for r in rows] == [
        (arm.name, arm.implementation or "best", arm.scan) for arm in arms
    ]
    base = {
        (row["scan_blocks"], row["remat"]): row for row in rows if row["connection"] == "residual"
    }
    for row in rows:
        assert len(row["ms"]) == step_time.ROUNDS
        assert row["overhead_percent"] == over(row, base[row["scan_blocks"], row["remat"]])
    assert all(row["overhead_percent"] == 0 for row in base.values())
    table = [line.split() for line in printed.splitlines()[-len(rows) :]]
    for line, row in zip(table, rows, strict=True):
        names = [*row["connection"].split(), row["implementation"]]
        assert line[: len(names)] == names
        assert line[-4:-2] == [f"{ms:.2f}" for ms in row["ms"]]
        assert line[-2] == f"{row['overhead_percent']:.1f}%"


@pytest.mark.usefixtures("short_steps")
def test_step_time(run):
    check_step_time(*run(step_time, *flags(SIZES)), step_time.ARMS)


def test_step_time_of_a_true_step(run, monkeypatch):
    """Which gives back the buffers of its state, call by call."""
    arms = [step_time.Arm("residual")]
    assert set(arms) <= set(step_time.ARMS)
    monkeypatch.setattr(step_time, "ARMS", arms)
    result, printed = run(step_time, *flags(SIZES))
    check_step_time(result, printed, arms)


def test_step_time_refuses_a_width_without_whole_heads(run):
    with pytest.raises(SystemExit, match="--width=100 is not a multiple of 128"):
        run(step_time, "--width=100")


@pytest.mark.usefixtures("run", "short_steps")
def test_recompute_step_time(monkeypatch, tmp_path, capsys):
    sizes, arms = SIZES | {"num_blocks": 8}, recompute_step_time.ARMS
    monkeypatch.setattr(recompute_step_time, "SHAPE", sizes)
    monkeypatch.setattr("sys.argv", ["x", "step_time", "--results", str(tmp_path)])
    with pytest.raises(SystemExit):
        recompute.main()
    assert "step_time is for an accelerator, and jax finds the CPU alone" in capsys.readouterr().err
    monkeypatch.setattr(cli.Parser, "need_accelerator", lambda *_: None)
    recompute.main()
    result = record.read(record.result_path("recompute", folder=tmp_path))["step_time"]
    rows = result["arms"]
    assert result["shape"] == sizes
    assert [(r["connection"], r["policy"], r["scan_blocks"]) for r in rows] == arms
    # Eq. 20 for 16 sublayers and 4 streams, 1 stream; one block where F is computed again.
    best = {("residual", "mhc"): 2, ("mhc", "mhc"): 4, ("mhc", "full"): 2, ("mhc", "offload"): 2}
    none = arms.index(("mhc", "none", False))
    for row in rows:
        if row["policy"] != "none":
            assert row["block"] == best[row["connection"], row["policy"]]
        assert row["over_none_percent"] == over(row, rows[none])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[-1 - len(rows) : -1]]
    for line, row in zip(lines, rows, strict=True):
        assert line[:2] == [row["connection"], row["policy"]]
        assert line[2] == ("scanned" if row["scan_blocks"] else "written")
        assert f"{row['over_none_percent']:.1f}%" in line


@pytest.mark.usefixtures("short_steps")
def test_scaling(run, monkeypatch):
    """The one device here counts twice."""
    two = types.SimpleNamespace(
        **{name: getattr(jax, name) for name in ("devices", "block_until_ready")}, device_count=lambda: 2,
        __version__=jax.__version__,
    )  # fmt: skip
    monkeypatch.setattr(scaling, "jax", two)
    result, printed = run(scaling, *flags(SIZES | {"num_heads": 1}))
    rows = result["arms"]
    arms = [(c, p) for c in ("residual", "mhc") for p in ("one", "data", "fsdp")]
    assert [(r["connection"], r["placement"]) for r in rows] == arms
    by_arm = dict(zip(arms, rows))
    for (connection, placement), row in by_arm.items():
        assert len(row["ms"]) == scaling.ROUNDS
        assert row["devices"] == 1
        assert row["tokens_per_second"] == pytest.approx(
            16e3 / statistics.mean(row["ms"]), rel=0.05
        )
        alone = by_arm[connection, "one"]["tokens_per_second"]
        assert row["speedup"] == pytest.approx(row["tokens_per_second"] / alone, rel=0.01)
        assert row["over_residual_percent"] == over(row, by_arm["residual", placement])
    assert by_arm["mhc", "one"]["speedup"] == 1
    assert [line.split()[:2] for line in printed.splitlines()[-6:]] == [list(arm) for arm in arms]
    assert result["XLA_FLAGS"] == os.environ["XLA_FLAGS"]
    assert SCALING_FLAGS.startswith("--xla_gpu_enable_latency_hiding_scheduler=true ")


def test_scaling_needs_two_devices(run):
    with pytest.raises(SystemExit, match="one device here"):
        run(scaling)


def test_moe_speed(run, monkeypatch):
    """Arrays from numpy: drawing them would be most of the time."""
    rng = np.random.default_rng(0)

    def draw(shape, dtype, std=1.0):
        return jnp.asarray(std * rng.standard_normal(shape), jnp.float32).astype(dtype)

    monkeypatch.setattr(
        moe_speed,
        "normal",
        lambda seed, *shape, dtype=jnp.bfloat16, std=1.0: draw(shape, dtype, std),
    )
    monkeypatch.setattr(
        nnx.initializers,
        "truncated_normal",
        lambda std: lambda key, shape, dtype: draw(shape, dtype, std),
    )
    sizes = {
        "tokens": 32, "sequence_length": 16, "width": 8, "num_experts": 4, "experts_per_token": 2,
        "shared_experts": 1, "expert_width": 8, "repeats": 1,
    }  # fmt: skip
    result, printed = run(moe_speed, *flags(sizes), "--capacity_factors", "1.0")
    assert result["options"] == sizes | {"capacity_factors": [1.0]}
    dense, capacity, *dropless = result["layers"]
    assert [dense["layer"], capacity["layer"]] == ["dense matmuls", "capacity 1"]
    assert [row["layer"] for row in dropless] in (
        [],
        ["dropless"],
    )  # by the kernels of the platform
    for row in result["layers"]:
        # Gate, up and down of 3 experts, forward and twice backward.
        flops = 32 * 3 * (3 * 2 * 8 * 8) * 3
        assert row["tflops"] * row["ms"] * 1e9 == pytest.approx(flops)
        assert row["share_of_dense"] == pytest.approx(dense["ms"] / row["ms"])
    assert 0 <= capacity["dropped"] < 1
    assert capacity["busiest_over_mean"] >= 1
    parts = result["parts_ms"]
    named = [f"{kind}: {part}" for kind in ("dropless", "capacity 1.25")
             for part in ("sort", "to rows", "to tokens", "experts")]  # fmt: skip
    assert set(parts) | {"dropless: experts"} == {"router", *named}
    assert all(ms > 0 for ms in parts.values())
    for name in (*(row["layer"] for row in result["layers"]), *parts):
        assert name in printed
