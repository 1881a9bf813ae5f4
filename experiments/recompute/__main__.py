"""What does recomputation store, and what does it cost? Measured against Table 3 and Eq. 20.

Commands: python -m experiments.recompute memory                        (this machine's accelerator)
          python -m experiments.recompute memory --topology=v5p:2x2x1   (compiled for a TPU, on any CPU)
          python -m experiments.recompute step_time                     (one GPU with 80 GiB free)
          python -m experiments.recompute figure                        (from the JSON files)
Result:   JSON and PNG in experiments/recompute/results.
"""

import argparse
import os
import pathlib
import sys

from experiments import cli, libtpu

FOLDER = pathlib.Path(__file__).parents[1]


def _numbers(text: str, most: int = 48) -> list[int]:
    return [cli.integer(1, most)(part) for part in text.split(",") if part]


def _even(text: str) -> list[int]:
    numbers = _numbers(text, 24)
    if odd := [number for number in numbers if number % 2]:
        raise argparse.ArgumentTypeError(f"{odd[0]} is odd, and a block has two sublayers")
    return numbers


def parse_arguments() -> argparse.Namespace:
    parser = cli.Parser(prog="python -m experiments.recompute", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    memory = commands.add_parser("memory", help="bytes of compiled programs for several L_r")
    memory.add_argument("--topology", help="TPU to compile for, as v5p:2x2x1 (needs libtpu)")
    memory.add_argument("--synthetic", type=_numbers, default=[1, 2, 3, 4, 6, 8, 12, 16, 24, 48],
                        help="L_r of the stack whose F keeps nothing, of 48 sublayers")  # fmt: skip
    memory.add_argument("--decoder", type=_even, default=[2, 4, 6, 8, 12, 24],
                        help="even L_r of the decoder, of 24 sublayers")  # fmt: skip
    memory.add_argument(
        "--threads", type=cli.positive, default=os.cpu_count(), help="compilations at once"
    )
    commands.add_parser("step_time", help="milliseconds of a train step for each policy")
    commands.add_parser("figure", help="draws all results")
    for command in commands.choices.values():
        command.add_argument("--results", type=cli.new_folder, default=FOLDER,
                             help="folder of recompute/results")  # fmt: skip
    options = parser.parse_args()
    if options.command == "step_time":
        parser.need_accelerator("step_time is", "python -m experiments.step_time takes other sizes")
    if options.command == "memory" and not options.topology:
        parser.need_accelerator("memory without --topology is", "give --topology=v5p:2x2x1")
    return options


def _device(topology: str | None):
    """Returns the device to compile for, and its name in files and figures."""
    if topology is None:
        import jax

        return jax.devices()[0], jax.devices()[0].device_kind
    os.environ.update(libtpu.ENVIRONMENT)
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:
        sys.exit(f"--topology={topology}: libtpu does not know it or is not installed ({error})")
    return found.devices[0], "TPU " + topology.split(":")[0]


def main() -> None:
    options = parse_arguments()
    if options.command == "figure":
        from experiments.recompute import figure

        figure.draw_all(options.results / "recompute" / "results")
        return
    where = {"folder": options.results}
    if options.command == "step_time":
        from experiments import record
        from experiments.recompute import step_time

        result = step_time.measure()
        print(f"wrote {record.update('recompute', 'step_time', result, **where)}")
        return
    device, name = _device(options.topology)
    from experiments import record  # imports jax, after `_device`
    from experiments.recompute import memory

    where["device"] = record.device_slug(name)
    # One by one: the parts of a measurement may be taken apart.
    for part, blocks in (("synthetic", options.synthetic), ("decoder", options.decoder)):
        if blocks:
            shape = {"synthetic": memory.SYNTHETIC, "decoder": memory.DECODER}[part]
            print(f"{part} {shape} for {name}", flush=True)
            result = {"device": name} | getattr(memory, part)(
                device, blocks, options.threads, shape
            )
            print(f"wrote {record.update('recompute', f'memory/{part}', result, **where)}")


if __name__ == "__main__":
    cli.run(main)
