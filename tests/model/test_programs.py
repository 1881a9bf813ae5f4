"""Programs that are compiled side by side, and blocks that are lowered once."""

import functools
import threading
import types

import jax
import jax.numpy as jnp
import pytest
from test_train import tiny

from mhc_jax.programs import Programs
from mhc_jax.train_step import abstract_batch, abstract_state, evaluate


def program(*outcomes):
    """Something to lower, which compiles to the outcomes in turn."""
    left = list(outcomes)

    def compile_():
        outcome = left.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return types.SimpleNamespace(lower=lambda *_: types.SimpleNamespace(compile=compile_))


def test_programs_compile_beside_each_other():
    programs = Programs()
    shape = jax.ShapeDtypeStruct((3,), jnp.float32)
    programs.start("double", jax.jit(lambda x: 2 * x), shape)
    programs.start("sum", jax.jit(jnp.sum), shape)
    assert programs.is_there("double", 60)
    assert programs.wait("sum")(programs.wait("double")(jnp.ones(3))) == 6
    assert programs.was_started("sum")
    assert not programs.was_started("other")
    programs.close()


def test_a_program_waits_for_another():
    order, first = [], threading.Event()

    def named(name, wait=None):
        def compile_():
            if wait:
                wait.wait(60)
            order.append(name)

        return types.SimpleNamespace(lower=lambda *_: types.SimpleNamespace(compile=compile_))

    programs = Programs()
    programs.start("step", named("step", first))
    programs.start("validation", named("validation"), after="step")
    assert not programs.is_there("validation", 0.1)
    first.set()
    programs.wait("validation")
    assert order == ["step", "validation"]
    failed = Programs()  # what follows a failure is compiled
    failed.start("step", program(RuntimeError("x"), "compiled"))
    failed.start("gains", program("gains"), after="step")
    assert (failed.wait("gains"), failed.wait("step")) == ("gains", "compiled")


def test_a_failure_is_tried_again_without_the_others_and_then_told(caplog):
    programs = Programs()
    programs.start("step", program("compiled"))
    programs.start("gains", program(RuntimeError("RESOURCE_EXHAUSTED: a\nb"), "compiled too"))
    programs.start("validation", program(RuntimeError("first"), RuntimeError("second")))
    assert programs.wait("step") == "compiled"
    assert programs.wait("gains") == "compiled too"
    assert "compiling the gains again: RESOURCE_EXHAUSTED: a" in caplog.text
    with pytest.raises(RuntimeError, match="second"):
        programs.wait("validation")
    alone = Programs()
    alone.start("step", program(RuntimeError("at once")))
    with pytest.raises(RuntimeError, match="at once"):
        alone.wait("step")


@pytest.mark.parametrize("remat", ["none", "full"])
def test_equal_blocks_are_lowered_once(remat):
    """Twice the blocks, hardly more text: the arrays of each block are cut out and put together again."""

    def size(num_blocks):
        config = tiny("mhc", **{"model.num_blocks": num_blocks, "model.scan_blocks": False,
                                "model.remat": remat})  # fmt: skip
        forward = jax.jit(functools.partial(evaluate, config=config.model))
        return len(forward.lower(abstract_state(config).params, abstract_batch(config)).as_text())

    assert size(6) < 1.3 * size(3)
