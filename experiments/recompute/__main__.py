"""What does recomputation store, and what does it cost? Measured against Table 3 and Eq. 20.

Commands: python -m experiments.recompute memory                        (this machine's accelerator)
          python -m experiments.recompute memory --topology=v5p:2x2x1   (compiled for a TPU, on any CPU)
          python -m experiments.recompute step_time                     (one GPU with 80 GiB free)
          python -m experiments.recompute figure                        (from the JSON files)
Result:   JSON and PNG in experiments/recompute/results.
"""

import argparse
import json
import os
import pathlib
import platform
import sys

RESULTS = pathlib.Path(__file__).parent / "results"


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.recompute",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    memory = commands.add_parser("memory", help="bytes of compiled programs for several L_r")
    memory.add_argument("--topology", help="TPU to compile for, as v5p:2x2x1 (needs libtpu)")
    memory.add_argument("--synthetic", type=_numbers, default=[1, 2, 3, 4, 6, 8, 12, 16, 24, 48],
                        help="L_r of the stack whose F keeps nothing, of 48 sublayers")  # fmt: skip
    memory.add_argument("--decoder", type=_numbers, default=[2, 4, 6, 8, 12, 24],
                        help="even L_r of the decoder, of 24 sublayers")  # fmt: skip
    memory.add_argument("--threads", type=int, default=os.cpu_count(), help="compilations at once")
    commands.add_parser("step_time", help="milliseconds of a train step for each policy")
    commands.add_parser("figure", help="draws all results")
    for command in commands.choices.values():
        command.add_argument("--results", type=pathlib.Path, default=RESULTS, help="folder")
    return parser.parse_args()


def _device(topology: str | None):
    """The device to compile for, and how files and figures call it."""
    if topology is None:
        import jax

        return jax.devices()[0], jax.devices()[0].device_kind
    # libtpu reads these when it is loaded: no TPU is looked for, and several processes may load it.
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:
        sys.exit(f"--topology={topology}: libtpu does not know it or is not installed ({error})")
    return found.devices[0], "TPU " + topology.split(":")[0]


def _write(folder: pathlib.Path, name: str, result: dict) -> None:
    """Adds to what the file has: the parts of a measurement may be taken one by one."""
    import jax

    about = {"jax": jax.__version__, "python": platform.python_version()}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    there = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(there | about | result, indent=2) + "\n")
    print(f"wrote {path}")


def main() -> None:
    options = parse_arguments()
    if options.command == "figure":
        from experiments.recompute import figure

        figure.draw_all(options.results)
        return
    if options.command == "step_time":
        from experiments.recompute import step_time

        _write(options.results, "step_time", step_time.measure())
        return
    device, name = _device(options.topology)
    from experiments.recompute import memory

    file_name = "memory_" + name.lower().replace(" ", "_")
    result = {"device": name}
    for part, blocks in (("synthetic", options.synthetic), ("decoder", options.decoder)):
        if blocks:
            shape = {"synthetic": memory.SYNTHETIC, "decoder": memory.DECODER}[part]
            print(f"{part} {shape} for {name}", flush=True)
            result[part] = getattr(memory, part)(device, blocks, options.threads, shape)
            _write(options.results, file_name, result)


if __name__ == "__main__":
    main()
