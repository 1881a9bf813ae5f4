"""Turns windows into batches: order, epochs, the share of each process, position."""

import copy
import functools
from typing import Any

import grain
import numpy as np

from mhc_jax.data import sources
from mhc_jax.data.config import DataConfig
from mhc_jax.data.records import BadRecord
from mhc_jax.data.tokenizer import load_tokenizer
from mhc_jax.losses import IGNORE_INDEX

# Validation has the same order in every run, so that losses of different seeds compare. It is shuffled, so
# that the first few batches are a sample of all files, not of the alphabetically first ones.
_VALIDATION_ORDER_SEED = 0

# Threads and prefetched batches. Grain's own default buffer of 500 would hold gigabytes at long
# sequences. Arrays in memory need one thread; more would contend for the interpreter lock. Reads from disk
# wait, so several batches are read at once. Batches come out in order either way.
_MEMORY_READS = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
_DISK_READS = grain.ReadOptions(num_threads=8, prefetch_buffer_size=8)


_MORE_WINDOWS = {
    "train": "add text or lower validation_fraction",
    "validation": "raise validation_fraction",
}


def vocab_size(config: DataConfig) -> int:
    """Returns the number of token ids: every id of every batch lies below it."""
    if config.source == "synthetic":
        return config.synthetic_vocab_size
    return load_tokenizer(config.tokenizer).vocab_size


def num_windows(config: DataConfig, split: str) -> int:
    """Returns the number of windows of one epoch of `split`.

    One pass over the validation split is `num_windows(config, "validation") // batch_size` batches
    of a validation iterator.
    """
    return len(sources.open_windows(config, split))


def make_iterator(
    config: DataConfig,
    *,
    split: str,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    on_corrupt: str = "stop",
) -> grain.DatasetIterator:
    """Returns an endless iterator over batches of one split.

    Rows are windows of `sequence_length + 1` tokens that overlap in one token (see
    `sources.TokenWindows`); `targets[:, t]` is the token after `inputs[:, t]`.

    "train": the windows in random order, a new order each epoch from (shuffle_seed, epoch). Epochs
    follow without a gap: a batch may hold the end of one and the start of the next.

    "validation": every pass is the same `num_windows // batch_size` batches, whatever shuffle_seed;
    windows that do not fill a batch are left out.

    The global batch at a step does not depend on `process_count`: process p reads the rows
    `[p * batch_size / process_count, (p + 1) * batch_size / process_count)` of it, which is what
    `jax.make_array_from_process_local_data` expects of a batch axis sharded over processes in order.

    Args:
      config: what to read.
      split: "train" or "validation".
      batch_size: rows of the global batch.
      process_index: this process, usually `jax.process_index()`.
      process_count: all of them, usually `jax.process_count()`.
      on_corrupt: what happens if a record of "array_record" cannot be read. "stop" raises
        `records.BadRecord` from `next`. With "skip" the targets of its windows are `losses.IGNORE_INDEX`
        and do not count.

    Returns:
      An iterator over `{"inputs": int32 [batch_size / process_count, sequence_length], "targets":
      the same}` with `get_state()` and `set_state()`, see `BatchIterator`.

    Raises:
      ValueError: batch_size is not divisible by process_count, there is no such process, there are fewer
        windows than a batch has rows, or the source has a fault that the message names.
    """
    if process_count < 1 or not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index={process_index} must lie in [0, process_count={process_count})."
        )
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size={batch_size} must be a positive multiple of "
            f"process_count={process_count}: it counts the rows of all processes together."
        )
    windows = sources.open_windows(config, split)
    _check_enough(len(windows), split, batch_size)
    # Indices of windows are shuffled and batched, and a batch reads its windows at once: grain spends 80 us
    # on each element of a source, so rows as elements would cost 20 ms for a batch of 256.
    if split == "train":
        # SeedSequence spreads the seed because grain adds the epoch to it: with the plain number, epoch 1
        # of seed 0 would be epoch 0 of seed 1.
        seed = int(np.random.SeedSequence(config.shuffle_seed).generate_state(1)[0])
        rows = grain.MapDataset.range(len(windows)).shuffle(seed=seed).repeat()
    else:
        rows = _validation_rows(len(windows), batch_size).repeat(reseed_each_epoch=False)
    batches = rows.batch(batch_size // process_count, drop_remainder=True)
    share = batches[process_index::process_count].map(
        functools.partial(_read_batch, windows, on_corrupt)
    )
    identity = {
        "split": split,
        "corpus": windows.fingerprint,
        "num_windows": len(windows),
        "sequence_length": config.sequence_length,
        "batch_size": batch_size,
    }
    if split == "train":
        identity["shuffle_seed"] = config.shuffle_seed
    reads = _DISK_READS if config.source == "array_record" else _MEMORY_READS
    return BatchIterator(iter(share.to_iter_dataset(reads)), identity)


def validation_order(num_windows: int, batch_size: int, batches: int) -> list[int]:
    """Indices of the windows of the first batches of the validation split, in their order.

    Args:
      num_windows: of the split.
      batch_size: windows of a batch.
      batches: how many; where there are fewer, all.

    Raises:
      ValueError: fewer windows than a batch.
    """
    _check_enough(num_windows, "validation", batch_size)
    rows = _validation_rows(num_windows, batch_size)
    # One by one: as an iterable grain fetches all of them ahead, in threads, 0.5 ms each.
    return [int(rows[k]) for k in range(min(len(rows), batches * batch_size))]


def _validation_rows(num_windows: int, batch_size: int) -> grain.MapDataset:
    whole = num_windows - num_windows % batch_size
    return grain.MapDataset.range(num_windows).shuffle(seed=_VALIDATION_ORDER_SEED)[:whole]


def _check_enough(num_windows: int, split: str, batch_size: int) -> None:
    if num_windows < batch_size:
        raise ValueError(
            f"The {split} split has {num_windows} windows, batch_size={batch_size} needs as many at least: "
            f"lower batch_size or sequence_length, or {_MORE_WINDOWS[split]}."
        )


class BatchIterator(grain.DatasetIterator):
    """A grain iterator whose state says what it belongs to.

    A position alone would be accepted by any other corpus, batch size or seed and would then skip
    or repeat text without a word; here such a restore fails. The state is the same on all
    processes and does not depend on how many there are.
    """

    _MUTATES_ELEMENT_SPEC = False

    def __init__(self, parent: grain.DatasetIterator, identity: dict[str, int | str]):
        super().__init__(parent)
        self._identity = identity

    def pair_with(self, validation: "BatchIterator") -> None:
        """Makes the validation corpus a part of the identity, so that a changed one is noticed too."""
        self._identity["validation_corpus"] = validation._identity["corpus"]

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._parent)

    def get_state(self) -> dict[str, Any]:
        """Returns `{"next_index": batches handed out, "identity": {...}}`, JSON-able."""
        return {**self._parent.get_state(), "identity": dict(self._identity)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken: the same batches follow, bit for bit.

        Raises:
          ValueError: the state belongs to other data, another batch size, seed or split.
        """
        state = copy.copy(state)
        saved = state.pop("identity", {})
        if "validation_corpus" not in saved:  # saved before the validation corpus was part of it
            saved = {**saved, "validation_corpus": self._identity.get("validation_corpus")}
        differing = [
            f"{name}: saved {saved.get(name)!r}, now {self._identity.get(name)!r}"
            for name in sorted({*saved, *self._identity})
            if saved.get(name) != self._identity.get(name)
        ]
        if differing:
            raise ValueError(
                "The saved position belongs to another data stream ("
                + "; ".join(differing)
                + "): restore the old settings, or start the data anew without restoring it."
            )
        self._parent.set_state(state)


def _read_batch(
    windows: sources.Windows, on_corrupt: str, indices: np.ndarray
) -> dict[str, np.ndarray]:
    rows, lost = [], []
    for index in indices.tolist():
        try:
            rows.append(windows[index])
        except BadRecord:
            if on_corrupt == "stop":
                raise
            rows.append(None)
            lost.append(len(rows) - 1)
    for row in lost:
        rows[row] = np.zeros(windows.sequence_length + 1, np.int32)
    stacked = np.stack(rows)
    batch = {"inputs": stacked[:, :-1].copy(), "targets": stacked[:, 1:].copy()}
    batch["targets"][lost] = IGNORE_INDEX
    return batch
