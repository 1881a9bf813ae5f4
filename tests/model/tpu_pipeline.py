"""Run by test_pipeline.py in a process of its own with libtpu: transfers of a pipeline on a slice of TPUs."""

import re
import sys

from jax.experimental import topologies

from configs import default
from experiments.pod_plan.text import parse
from mhc_jax import sharding
from mhc_jax.config import from_dict
from mhc_jax.train_step import abstract_batch, abstract_state, jit_train_step

FIELDS = {
    "batch_size": 16, "data.sequence_length": 512, "optimizer.accumulate_steps": 8,
    "model.num_blocks": 4, "model.width": 256, "model.num_heads": 2, "model.ffn_width": 512,
    "mesh.pipe": 2, "mesh.data": 2, "model.connection": "residual",
}  # fmt: skip


def transfers(computations):
    """(in the background, of these with a conditional between start and done) of the permutes sent."""
    found, hidden, inside = 0, 0, 0
    branches = set()
    for body in computations.values():
        for instruction in body.values():
            if instruction.opcode == "conditional":
                branches.update(re.findall(r"%([\w.\-]+)", instruction.attributes))
    for name, body in computations.items():
        order = list(body.values())
        for place, start in enumerate(order):
            if not start.opcode.startswith("collective-permute"):
                continue
            inside += name in branches
            if start.opcode != "collective-permute-start":
                continue
            found += 1
            done = next(
                k for k, i in enumerate(order)
                if i.opcode == "collective-permute-done" and start.name in i.operands
            )  # fmt: skip
            hidden += any(i.opcode == "conditional" for i in order[place:done])
    assert not inside, "a collective-permute in a conditional"
    return found, hidden


if __name__ == "__main__":
    topology, name = sys.argv[1:3]
    values = default.get_config()
    values.update_from_flattened_dict(FIELDS | {"pipe_schedule": name})
    config = from_dict(values)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = sharding.make_mesh(config.mesh, list(devices)[:4])
    step = jit_train_step(config, mesh)
    compiled = step.lower(abstract_state(config, mesh), abstract_batch(config)).compile()
    print(*transfers(parse(compiled.as_text())[0]))
