"""What a run tells: what it compiles, how fast it is, how long it will take, what comes next."""

import importlib.util
import logging
import re
import shlex
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from test_train import tiny

from mhc_jax import progress

LONG = tiny(steps=1000, eval_every=100, gains_every=0, checkpoint_every=300)


@pytest.fixture
def clock(monkeypatch):
    """`clock.now` is the time."""
    found = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: found.now)
    return found


def test_the_time_left_is_that_of_steps_and_of_what_is_due(clock):
    """Ten times slower steps now and then, compilation and evaluations do not distort it."""
    run = progress.Progress(LONG, 0)
    for step in range(1, 101):
        seconds = None if step == 1 else 20.0 if step % 25 == 0 else 2.0
        run.stepped(3.0, seconds)
    assert run.tokens_per_second() == 4 * 16 / 2.0
    assert run.seconds_left() == 900 * 2.0
    with run.pause("evaluate", 100):

        def compile_():
            clock.now += 500.0

        run.compile(None, compile_, "compiling the validation")
        clock.now += 7.0
    # 9 more, the last of them after the last step.
    assert run.seconds_left() == 900 * 2.0 + 9 * 7.0
    with run.pause("save", 300):
        clock.now += 11.0
    # Behind steps 300, 600, 900 and the last.
    assert run.seconds_left() == 900 * 2.0 + 9 * 7.0 + 4 * 11.0
    with run.pause(
        "save", 300
    ):  # what jax compiles when a function is first called is no saving either
        event = "/jax/core/compile/backend_compile_duration"
        jax.monitoring.record_event_duration_secs(event, 30.0)
        clock.now += 30.0 + 11.0
    assert run.seconds_left() == 900 * 2.0 + 9 * 7.0 + 4 * 11.0
    run.back_to(950)
    assert run.seconds_left() == 50 * 2.0 + 7.0 + 11.0
    with run.pause("gains", 0):  # due at the end alone
        clock.now += 1.0
    assert run.seconds_left() == 50 * 2.0 + 7.0 + 11.0 + 1.0


def test_jax_tells_how_long_it_compiles():
    """The event that a pause listens to is one that jax sends."""
    before = progress._compiled_here()
    jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x))(jnp.ones((7, 7))).block_until_ready()
    assert 0 < progress._compiled_here() - before < 60


def test_without_a_terminal_there_are_few_lines(clock, caplog, capsys, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))  # of another test
    run = progress.Progress(LONG, 0)
    with run.running("mHC"):
        for tenth in range(240):  # twelve seconds of compiling, told twice a second
            clock.now = tenth / 20
            run._tell("compiling the train step", clock.now)
        for _ in range(1000):
            clock.now += 1.0
            run.stepped(2.5, 1.0)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "compiling the train step ... 10 s"
    assert "step 9 of 1000, loss 2.500, 64 tokens/s, 16:31 left" in lines
    assert lines[-1] == "step 1000 of 1000, loss 2.500, 64 tokens/s"
    assert 30 < len(lines) < 70, "from every ten seconds to every fifty"
    assert capsys.readouterr().err == ""


def test_a_terminal_shows_a_live_line(clock, caplog, capsys, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "on_terminal", lambda: True)
    run = progress.Progress(LONG, 100)
    with run.running("mHC"):
        clock.now = 100.0  # time for a line, were there no terminal
        run._tell("compiling the train step", 31.4)
        run.stepped(2.5, 0.5)
        run._bar.refresh()
    shown = capsys.readouterr().err
    assert re.search(r"mHC:  10%.* 100/1000 \[.*, compiling the train step 31 s\]", shown)
    assert re.search(r"101/1000 \[.*, loss 2\.500, 128 tokens/s, 07:29 left\]", shown)
    assert not caplog.records

    class NoWidth:  # of a terminal that `script` makes, for one
        columns = 0

    monkeypatch.setattr(progress.os, "get_terminal_size", lambda *_: NoWidth)
    monkeypatch.setattr(progress.sys.stderr, "fileno", lambda: 2, raising=False)
    with run.running("mHC"):
        assert run._bar.ncols == 100
    capsys.readouterr()
    silent = progress.Progress(LONG, 100, shown=False)  # another process than the first
    with silent.running("mHC"):
        silent.stepped(2.5, 0.5)
    assert capsys.readouterr().err == ""


def test_what_comes_next_can_be_run(monkeypatch):
    text = progress.what_next(tiny("hc", **{"data.source": "stdlib"}), "runs/my hc")
    commands = [line.split() for line in text.splitlines() if line.startswith("  python")]
    assert [words[2] for words in commands] == [
        "experiments.evaluate", "experiments.sample", "experiments.report"
    ]  # fmt: skip
    assert all(importlib.util.find_spec(words[2]) for words in commands)
    assert "runs/my hc" in shlex.split(text.splitlines()[3])
    assert "gains/" in text
    text = progress.what_next(tiny("residual"), "runs/residual")
    assert "sample" not in text, "synthetic tokens are no text"
    assert "gains/" not in text
    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name: None)
    assert "experiments" not in progress.what_next(tiny("hc"), "runs/hc")
