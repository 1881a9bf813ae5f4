"""Opens the data of a run: to train on, to validate on, and the tokens that gains are measured on."""

from typing import NamedTuple

import grain
import numpy as np

from mhc_jax.batch_placement import BatchPlacement
from mhc_jax.config import Config
from mhc_jax.data import make_iterator


class RunData(NamedTuple):
    """The opened data of a run.

    Attributes:
      train: batches of this process's rows; its position is part of a checkpoint.
      validation: the same of the validation split.
      gains_tokens: `[1, S]` int32, the same sequence on every process and at every step.
    """

    train: grain.DatasetIterator
    validation: grain.DatasetIterator
    gains_tokens: np.ndarray


def open_data(config: Config, placement: BatchPlacement) -> RunData:
    """Opens the corpora of a run.

    Args:
      config: of the run.
      placement: says which rows of a batch are this process's.

    Raises:
      ValueError, OSError: as `data.make_iterator`.
    """
    every = {"config": config.data, "on_corrupt": config.on_corrupt_data}
    share = {
        "batch_size": config.batch_size,
        "process_index": placement.index,
        "process_count": placement.count,
    }
    train = make_iterator(split="train", **every, **share)
    validation = make_iterator(split="validation", **every, **share)
    train.pair_with(validation)
    one = make_iterator(split="validation", batch_size=1, **every)
    return RunData(train, validation, next(one)["inputs"])
