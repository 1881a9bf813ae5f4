"""Reads what a run has left in its workdir: steps, losses, checkpoints."""

import json
import logging
import os
import pathlib

from experiments.fault_tour.trainer import FIELDS


def saved(workdir: pathlib.Path) -> list[int]:
    """Returns the steps of the checkpoints, ascending."""
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit())


def newest(workdir: pathlib.Path) -> pathlib.Path:
    """Returns the folder of the newest checkpoint."""
    return workdir / "checkpoints" / str(saved(workdir)[-1])


def contents(workdir: pathlib.Path) -> dict:
    """Returns configuration and checksums of the newest checkpoint."""
    return json.loads((newest(workdir) / "contents" / "metadata").read_text())


def losses(workdir: pathlib.Path) -> dict[int, float]:
    """Returns step -> loss; a killed run may have left half a line."""
    found = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if "train/loss" in entry:
            found[entry["step"]] = entry["train/loss"]
    return found


def steps(workdir: pathlib.Path) -> int:
    """Returns how many lines of metrics there are; each step has one."""
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def unfinished(workdir: pathlib.Path) -> set[tuple[str, int]]:
    """Returns the checkpoints that are being written, by name and inode."""
    folder = workdir / "checkpoints"
    found = os.scandir(folder) if folder.is_dir() else []
    return {(entry.name, entry.inode()) for entry in found if "tmp" in entry.name}


def last_line(said: str) -> str:
    """Returns the last line of what a process has said."""
    return said.strip().rpartition("\n")[2]


def restore(workdir: pathlib.Path, steps: int | None = None) -> tuple[int | None, bool, str]:
    """Returns the step that a run would resume from, whether the state is what was saved, and the output."""
    from configs import default
    from mhc_jax import checkpoint, checksum
    from mhc_jax.config import from_dict
    from mhc_jax.data import make_iterator
    from mhc_jax.mesh import make_mesh
    from mhc_jax.train_step import abstract_state

    values = default.get_config()
    values.update_from_flattened_dict(FIELDS | ({"steps": steps} if steps else {}))
    config = from_dict(values)
    pristine = {
        step: checkpoint.read_contents(workdir.parent / "straight" / "checkpoints" / str(step))
        for step in saved(workdir.parent / "straight")
    }
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    log = logging.getLogger("mhc_jax.checkpoint")
    log.addHandler(handler)
    log.propagate = False
    checkpoints = checkpoint.Checkpoints(workdir, kept=config.checkpoints_kept)
    data, validation = (
        make_iterator(config.data, split=split, batch_size=config.batch_size)
        for split in ("train", "validation")
    )
    data.pair_with(validation)  # as training does
    try:
        state = checkpoints.restore(abstract_state(config, make_mesh(config.mesh)), data)
    except ValueError as error:
        return None, False, str(error)
    finally:
        checkpoints.close()
        log.removeHandler(handler)
    step = int(state.step)
    found = checksum.of_arrays(state), checksum.of_json(data.get_state())
    right = step not in pristine or found == (pristine[step]["arrays"], pristine[step]["data"])
    return step, right, "; ".join(said)
