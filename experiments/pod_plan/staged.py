"""Says what the stages of a pipeline hold on a chip by their shapes, without compiling."""

from jax.sharding import Mesh

from mhc_jax import units
from mhc_jax.config import Config
from mhc_jax.train_step import abstract_batch, abstract_state, make_pipeline


def held(config: Config, mesh: Mesh) -> dict[str, int]:
    """Returns the bytes of `Pipeline.held`; nothing without stages, or where autodiff decides (gpipe)."""
    stages = make_pipeline(config, mesh)
    if stages is None or config.pipe_schedule == "gpipe":
        return {}
    state = abstract_state(config, mesh)
    return stages.held(state.params, state.model_state, abstract_batch(config))


def show(found: dict[str, int]) -> None:
    """Prints what `held` returns."""
    if found:
        parts = ", ".join(f"{name} {units.size(size)}" for name, size in found.items())
        print(f"stages     hold {units.size(sum(found.values()))} by their shapes: {parts}")
