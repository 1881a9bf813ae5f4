"""Run by test_remat.py in a process of its own with libtpu: where `offload` keeps block inputs on a TPU."""

from jax.experimental import topologies

from experiments.recompute import models

SHAPE = {
    "num_blocks": 2, "width": 128, "ffn_width": 128, "vocab_size": 256, "batch_size": 2,
    "sequence_length": 512,
}  # fmt: skip

if __name__ == "__main__":
    [device, *_] = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices
    program, arguments = models.train_step(models.decoder_config(SHAPE, "offload", "auto"), device)
    memory = program.lower(*arguments).compile().memory_analysis()
    streams = SHAPE["batch_size"] * SHAPE["sequence_length"] * models.N * SHAPE["width"] * 2
    print(memory.host_temp_size_in_bytes / streams)
