"""Settings and fixtures of the kernel tests."""

import os

# Triton chooses its interpreter when it is imported, by whichever test comes first.
os.environ["TRITON_INTERPRET"] = "1"

import pytest
from jax.experimental.pallas import tpu as pltpu


@pytest.fixture
def interpreter():
    """Runs implementation="pallas" in the TPU interpreter and fails on a race."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as internals

    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    with pltpu.force_tpu_interpret_mode(params):
        yield
    assert internals.races is None or not internals.races.races_found
    pltpu.reset_tpu_interpret_mode_state()
