"""Run by test_pipeline.py in a process of its own with libtpu: transfers of a pipeline on a slice of TPUs."""

import sys

from jax.experimental import topologies

from configs import default
from experiments.pipeline_plan.hidden import count_sends
from mhc_jax.config import from_dict
from mhc_jax.mesh import make_mesh
from mhc_jax.pipeline.schedule import num_stages
from mhc_jax.train_step import abstract_batch, abstract_state, jit_train_step

FIELDS = {
    "batch_size": 16, "data.sequence_length": 512, "optimizer.accumulate_steps": 8,
    "model.width": 256, "model.num_heads": 2, "model.ffn_width": 512,
    "mesh.pipe": 2, "mesh.data": 2, "model.connection": "residual",
}  # fmt: skip


def count(topology, name, policy, split="", look_ahead=""):
    values = default.get_config()
    fields = {"pipe_schedule": name, "pipe_split_backward": bool(split), "model.remat": policy}
    if look_ahead:
        fields |= {
            "model.connection": "mhc",
            "model.lookahead_pre": True,
            "model.implementation": "xla",
        }
    values.update_from_flattened_dict(FIELDS | fields)
    values.model.num_blocks = num_stages(name, values.mesh.pipe)
    config = from_dict(values)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(config.mesh, list(devices)[:4])
    step = jit_train_step(config, mesh)
    compiled = step.lower(abstract_state(config, mesh), abstract_batch(config)).compile()
    return count_sends(compiled.as_text())


if __name__ == "__main__":
    for case in sys.argv[1:]:
        sends = count(*case.split(","))
        print(sends.total, sends.hidden, sends.conditional, *sends.beside, flush=True)
