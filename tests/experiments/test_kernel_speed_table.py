"""The table of kernel_speed at toy size: what is timed is traced, and the times are made up."""

import functools
import types

import jax
import pytest

import kernels_pallas as kp
from experiments import record
from experiments.kernel_speed import __main__ as kernel_speed
from experiments.kernel_speed import baselines, cases, chart, measure
from kernels_pallas import dispatch

T, C, N = 520, 8, 4
M = N * N + 2 * N
RATE = 1e12
# Of the first sublayer of a chain, and of each further one.
MICROSECONDS = {
    "read": (50.0, 0.0), "separate": (70.0, 0.0),
    "boundary": (60.0, 40.0), "boundary+norm": (10.0, 42.0),
    "logits": (10.0, 43.0), "logits+norm": (10.0, 44.0),
    "look-ahead": (10.0, 30.0), "look-ahead+norm": (10.0, 33.0),
    "hc": (10.0, 41.0), "hc+norm": (10.0, 45.0), "hc-separate": (10.0, 64.0),
}  # fmt: skip


@pytest.fixture
def timed(monkeypatch):
    """Arguments, bytes and copies of all that is timed, traced with "xla" in place of the kernels."""
    found = []

    def on_xla(function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            return function(*args, **kwargs | {"implementation": "xla"})

        return call

    ops = ("mappings", "pre", "read", "boundary", "look_ahead", "post_res")
    ops += ("projection", "hc_read", "hc_boundary", "read_logits", "boundary_logits")
    by_name = {name: on_xla(getattr(kp, name)) for name in ops}
    monkeypatch.setattr(cases, "kp", types.SimpleNamespace(**by_name))
    monkeypatch.setattr(
        cases,
        "dispatch",
        types.SimpleNamespace(
            run=lambda op, direction, _, *args, **static: dispatch.run(
                op, direction, "xla", *args, **static
            )
        ),
    )

    def seconds(f, inputs, copies=1):
        assert isinstance(f, functools.partial)
        assert len(inputs) >= min(2, copies)
        out = jax.eval_shape(f, *inputs[0])
        arrays = (*inputs[0], *jax.tree.leaves(out))
        found.append((f.args, sum(x.size * x.dtype.itemsize for x in arrays), copies))
        count, mode = f.args[1:] or (1, None)
        first, further = MICROSECONDS.get(mode, (10.0, 0.0))
        return 1e-6 * (first + (count - 1) * further)

    monkeypatch.setattr(measure, "seconds", seconds)
    monkeypatch.setattr(measure, "temporary_bytes", lambda f, args: 12345)
    monkeypatch.setattr(measure, "copy_rate", lambda: RATE)
    monkeypatch.setattr(measure, "L2_BYTES", 1.0)
    # Numbers do not matter where nothing is computed.
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: jax.numpy.zeros(shape))
    return found


def test_operations_move_what_they_read_and_write(timed, capsys):
    """Least bytes of each: its arguments and results, but for bias, alpha and the weight of a norm."""
    rows = kernel_speed._operations(T, C, RATE, "triton")
    assert [row["name"] for row in rows] == [case.name for case in cases.CASES]
    assert len(rows) == len(timed) == 10
    small = {
        "mappings fwd": 4 * (M + 3), "mappings bwd": 4 * 2 * (M + 3),
        "pre+norm fwd": 4 * C, "pre+norm bwd": 4 * 2 * C,
    }  # fmt: skip
    for row, (args, size, _) in zip(rows, timed, strict=True):
        assert args == ("triton",)
        moved = size - small.get(row["name"], 0)
        assert row["GB/s"] * 1e9 * 10e-6 == pytest.approx(moved), row["name"]
        assert row["share"] == pytest.approx(moved / 10e-6 / RATE)
        assert row["us"] == 10
        assert (row["T"], row["C"], row["implementation"]) == (T, C, "triton")
        # In units of the time that 2TC bytes take at the copy rate: 0.00832 us.
        assert row["tau"] == pytest.approx(10 / 0.00832)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in printed] == [[str(T), str(C)]] * 10


def test_table_of_the_sublayer_and_its_baselines(timed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kernel_speed, "BASELINE_SHAPES", ((T, C),))
    monkeypatch.setattr(kernel_speed, "SUBLAYERS_OF_FEW", 2)
    monkeypatch.setattr(cases, "CASES", cases.CASES[4:6])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "clear_caches", lambda: None)
    monkeypatch.setattr(baselines, "BASELINES", {"Liger-Kernel": None, "nobody's": None})

    def program(command, **options):
        name, *shape = command[-3:]
        assert shape == [str(T), str(C)]
        missing = types.SimpleNamespace(returncode=1, stderr="No module named 'nobody'")
        return (
            missing
            if name == "nobody's"
            else types.SimpleNamespace(returncode=0, stdout="x\n3e-4\n")
        )

    monkeypatch.setattr(kernel_speed, "subprocess", types.SimpleNamespace(run=program))
    monkeypatch.setattr("sys.argv", ["x", "--shapes", f"{T},{C}:16,{C}", "--out", str(tmp_path)])
    kernel_speed.main()

    path = record.result_path(kernel_speed.QUESTION, folder=tmp_path)
    content = record.read(path)
    assert content["table"]["copy rate"] == RATE
    ours, others = (content[part]["rows"] for part in ("table", "baselines"))
    found = {
        (row["name"], row["T"]): row["us"] for row in ours if row["name"].startswith("sublayer")
    }
    chains = {name: further for name, (_, further) in MICROSECONDS.items() if further}
    assert set(chains) == {mode for mode, *_ in kernel_speed.CHAINS}
    assert found == pytest.approx(
        {
            **{(f"sublayer, {mode}", t): us for mode, us in chains.items() for t in (T, 16)},
            **{("sublayer", t): 50 for t in (T, 16)},
            **{("sublayer, separate ops", t): 70 for t in (T, 16)},
        }
    )
    parameters = 12 * 4 * M * C
    for row in ours:
        of_a_pass = {"sublayer, look-ahead": 50, "sublayer, look-ahead+norm": 58}
        if row["name"] in ("sublayer", "sublayer, boundary", *of_a_pass):
            size = of_a_pass.get(row["name"], 90) * row["T"] * C + parameters
            assert row["GB/s"] * row["us"] * 1e3 == pytest.approx(size)
            assert row["tau"] == pytest.approx(row["us"] * 1e-6 * RATE / (2 * row["T"] * C))
    assert ours[-1]["temporary bytes"] == 12345
    by_name = {(row["name"], row["implementation"]): row["us"] for row in others}
    assert by_name["sublayer", "xla"] == pytest.approx(70)
    assert by_name["sublayer", "Liger-Kernel"] == pytest.approx(300)
    assert len(by_name) == len(cases.CASES) + 2
    printed = capsys.readouterr().out
    assert "nobody's: not measured (No module named 'nobody')" in printed
    bars = chart.bars(content)[T, C]
    assert bars[0][:1] == ("Liger-Kernel",)
    assert path.with_suffix(".png").stat().st_size > 5000


def test_seconds_are_of_one_call(monkeypatch):
    """Of a clock that counts calls: `copies` calls are one program, which is called in rounds."""
    clock, dispatched = [0.0], []

    def ready(out):
        clock[0] += 1e-3 * (len(dispatched) or 1)
        dispatched.clear()
        return out

    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    real = jax.jit

    def jit(function):
        compiled = real(function)

        def call(group):
            dispatched.append(1)
            return compiled(group)

        return call

    monkeypatch.setattr(
        measure,
        "jax",
        types.SimpleNamespace(
            jit=jit, block_until_ready=ready, lax=jax.lax, tree=jax.tree, Array=jax.Array
        ),
    )
    inputs = [(jax.numpy.full(3, float(k)), jax.numpy.ones(())) for k in range(4)]
    assert measure.seconds(lambda x, y: (x * y,), inputs, copies=4) == pytest.approx(1e-3 / 4)


def test_no_gpu_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["x"])
    with pytest.raises(SystemExit, match="kernel_speed needs an NVIDIA GPU, jax has 'cpu'"):
        kernel_speed.main()
