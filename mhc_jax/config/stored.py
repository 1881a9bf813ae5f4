"""Configurations of earlier runs: what may change since, and what they lack."""

from collections.abc import Mapping
from typing import Any

from mhc_jax.config.model import NEUTRAL, without_effect
from mhc_jax.config.reading import from_dict
from mhc_jax.config.run import Config

# These fields (beginnings of dotted names) say where and how a run is computed and what it writes, not what
# it learns. The paths of text and tokenizer may change, their content may not: the saved position in the
# data includes a hash of the tokens.
MAY_CHANGE = (
    "log_every",
    "eval_every",
    "gains_every",
    "checkpoint_every",
    "checkpoints_kept",
    "on_failed_save",
    "on_non_finite",
    "on_corrupt_data",
    "tensorboard",
    "pipe_schedule",
    "pipe_split_backward",
    "data.path",
    "data.tokenizer",
    "mesh",
    "model.implementation",
    "model.remat",
    "model.recompute_block",
    "model.scan_blocks",
    "model.loss_chunks",
)


# Fields that older config.json files lack -> what held before there were any.
LATER = {
    "on_failed_save": "stop",
    "on_non_finite": "stop",
    "on_corrupt_data": "stop",
    "pipe_schedule": "1f1b",
    "pipe_split_backward": False,
    "mesh.pipe": 1,
    "model.scan_blocks": True,
    "model.lookahead_pre": False,
    "model.static_res": False,
    "model.mhc_use_pre": True,
    "model.mhc_use_post": True,
    "model.mhc_use_res": True,
}


def _completed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the fields of `LATER` that a stored configuration lacks, and clears switches that did nothing.

    Runs that were started before such switches were refused stay readable.
    """
    values = dict(values)
    for name, before in LATER.items():
        part, _, field = name.rpartition(".")
        if not part:
            values.setdefault(field, before)
        elif isinstance(values.get(part), Mapping):
            values[part] = {field: before, **values[part]}
    model = values.get("model")
    if isinstance(model, Mapping) and "connection" in model:
        cleared = {field: neutral for field, neutral, *_ in without_effect(NEUTRAL | dict(model))}
        values["model"] = {**model, **cleared}
    return values


def from_workdir(values: Mapping[str, Any]) -> Config:
    """Reads the configuration of a config.json, also of one that is older than some fields.

    Raises:
      ValueError, TypeError: as `from_dict`.
    """
    return from_dict(_completed(values))


def conflicts(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple]:
    """Returns the `differences` of two runs that a resumed run may not have (see `MAY_CHANGE`)."""
    found = differences(_completed(a), _completed(b))
    return {name: pair for name, pair in found.items() if not name.startswith(MAY_CHANGE)}


def differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> dict[str, tuple]:
    """Returns the dotted names of the fields in which two nested mappings differ, with both values."""
    found = {}
    for name in sorted({*a, *b}):
        left, right = a.get(name), b.get(name)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            found |= differences(left, right, f"{prefix}{name}.")
        elif left != right:
            found[prefix + name] = (left, right)
    return found
