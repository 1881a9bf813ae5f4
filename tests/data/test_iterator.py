"""Properties of the batches: shift, coverage, order, processes, restart."""

import itertools
import json

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mhc_jax.data import make_iterator, num_windows, vocab_size
from mhc_jax.data.sources import open_windows


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def rows(batches):
    """Windows `[rows, S + 1]` put together again from inputs and targets."""
    inputs = np.concatenate([batch["inputs"] for batch in batches])
    targets = np.concatenate([batch["targets"] for batch in batches])
    return np.concatenate([inputs, targets[:, -1:]], axis=1)


def windows_of(config, split):
    windows = open_windows(config, split)
    return np.stack([windows[index] for index in range(len(windows))])


def as_set(array):
    return {tuple(row) for row in array.tolist()}


def assert_equal(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        np.testing.assert_array_equal(one["inputs"], other["inputs"])
        np.testing.assert_array_equal(one["targets"], other["targets"])


@pytest.mark.parametrize("source", ["text", "synthetic", "stdlib"])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_shapes_dtypes_and_shift(source, split, make_config, text_config):
    config = text_config() if source == "text" else make_config(source=source)
    for batch in take(make_iterator(config, split=split, batch_size=6), 4):
        for name in ("inputs", "targets"):
            assert batch[name].shape == (6, 8)
            assert batch[name].dtype == np.int32
            assert batch[name].min() >= 0
            assert batch[name].max() < vocab_size(config)
        np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])


@pytest.mark.parametrize("split", ["train", "validation"])
def test_targets_are_the_stream_once_each(split, text_config):
    # Sequence length 1: each window is one (input, target) pair of neighbours.
    windows = windows_of(text_config(sequence_length=1), split)
    stream = np.concatenate([windows[:1, 0], windows[:, 1]])
    np.testing.assert_array_equal(windows[:, 0], stream[:-1])

    windows = windows_of(text_config(sequence_length=7), split)
    predicted = windows[:, 1:].ravel()
    np.testing.assert_array_equal(predicted, stream[1 : 1 + predicted.size])
    assert 0 <= stream.size - 1 - predicted.size < 7


def test_train_epoch_holds_every_window_once_in_a_new_order(text_config):
    config = text_config()
    expected = windows_of(config, "train")
    size = len(expected)
    assert len(as_set(expected)) == size  # else a count of rows would prove nothing
    # Batches of 4 do not divide the epoch: two epochs follow each other without a gap.
    assert size % 4
    seen = rows(take(make_iterator(config, split="train", batch_size=4), -(-2 * size // 4)))
    first, second = seen[:size], seen[size : 2 * size]
    assert as_set(first) == as_set(second) == as_set(expected)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, expected)


def test_shuffle_seed_decides_the_train_order(text_config):
    size = num_windows(text_config(sequence_length=32), "train")

    def two_epochs(seed):
        config = text_config(sequence_length=32, shuffle_seed=seed)
        return rows(take(make_iterator(config, split="train", batch_size=1), 2 * size))

    np.testing.assert_array_equal(two_epochs(0), two_epochs(0))
    assert not np.array_equal(two_epochs(0)[:size], two_epochs(1)[:size])
    # Epoch 1 of seed 0 is not epoch 0 of seed 1 either.
    assert not np.array_equal(two_epochs(0)[size:], two_epochs(1)[:size])


def test_validation_passes_are_alike_for_every_seed(text_config):
    config = text_config()
    count = num_windows(config, "validation") // 4
    assert num_windows(config, "validation") % 4
    passes = take(make_iterator(config, split="validation", batch_size=4), 2 * count)
    assert_equal(passes[:count], passes[count:])
    again = make_iterator(text_config(shuffle_seed=5), split="validation", batch_size=4)
    assert_equal(passes[:count], take(again, count))
    seen = rows(passes[:count])
    assert len(as_set(seen)) == len(seen)
    assert as_set(seen) <= as_set(windows_of(config, "validation"))


def test_splits_share_no_window(text_config, make_config):
    for config in (text_config(), make_config(sequence_length=32)):
        windows = {split: open_windows(config, split) for split in ("train", "validation")}
        sets = [as_set(np.stack([w[i] for i in range(60)])) for w in windows.values()]
        assert not sets[0] & sets[1]


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("process_count", [2, 3, 6])
def test_processes_read_the_rows_of_the_global_batch(split, process_count, text_config):
    config = text_config()
    whole = take(make_iterator(config, split=split, batch_size=6), 40)
    shares = [
        take(
            make_iterator(
                config,
                split=split,
                batch_size=6,
                process_index=process,
                process_count=process_count,
            ),
            40,
        )
        for process in range(process_count)
    ]
    assert shares[0][0]["inputs"].shape == (6 // process_count, 8)
    joined = [
        {name: np.concatenate([part[name] for part in parts]) for name in ("inputs", "targets")}
        for parts in zip(*shares, strict=True)
    ]
    assert_equal(joined, whole)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_restart_from_json_state(split, text_config):
    config = text_config()
    iterator = make_iterator(config, split=split, batch_size=4)
    take(iterator, 5)
    state = json.loads(json.dumps(iterator.get_state()))
    assert len(json.dumps(state)) < 300
    expected = take(iterator, 70)  # over the end of an epoch
    fresh = make_iterator(config, split=split, batch_size=4)
    fresh.set_state(state)
    assert_equal(take(fresh, 70), expected)
    iterator.set_state(state)  # and back, on an iterator that has run ahead
    assert_equal(take(iterator, 70), expected)
    assert state["next_index"] == 5  # a state may be used twice


def test_state_serves_another_number_of_processes(text_config):
    whole = make_iterator(text_config(), split="train", batch_size=4)
    take(whole, 3)
    share = make_iterator(
        text_config(), split="train", batch_size=4, process_index=1, process_count=2
    )
    share.set_state(whole.get_state())
    np.testing.assert_array_equal(next(share)["inputs"], next(whole)["inputs"][2:])


def test_restart_through_orbax(tmp_path, text_config):
    config = text_config()
    iterator = make_iterator(config, split="train", batch_size=4)
    weights = np.arange(3.0)
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        take(iterator, 4)
        manager.save(
            4,
            args=ocp.args.Composite(
                model=ocp.args.StandardSave({"weights": weights}),
                data=grain.checkpoint.CheckpointSave(iterator),
            ),
        )
        expected = take(iterator, 50)

    restored = make_iterator(config, split="train", batch_size=4)
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        assert manager.latest_step() == 4
        manager.restore(
            4,
            args=ocp.args.Composite(
                model=ocp.args.StandardRestore({"weights": weights}),
                data=grain.checkpoint.CheckpointRestore(restored),
            ),
        )
    assert_equal(take(restored, 50), expected)


@pytest.mark.parametrize(
    ("changes", "batch_size", "named"),
    [
        ({"shuffle_seed": 1}, 4, "shuffle_seed: saved 0, now 1"),
        ({"sequence_length": 7}, 4, "sequence_length: saved 8, now 7"),
        ({}, 2, "batch_size: saved 4, now 2"),
        ({"validation_fraction": 0.5}, 4, "corpus: saved"),
    ],
)
def test_state_of_another_stream_is_refused(changes, batch_size, named, text_config):
    state = make_iterator(text_config(), split="train", batch_size=4).get_state()
    other = make_iterator(text_config(**changes), split="train", batch_size=batch_size)
    with pytest.raises(ValueError, match=named):
        other.set_state(state)


def test_synthetic_chain_is_learnable(make_config):
    windows = open_windows(make_config(sequence_length=512), "train")
    counts = np.zeros((16, 16))
    for index in range(50):
        np.add.at(counts, (windows[index][:-1], windows[index][1:]), 1)
    assert ((counts > 0).sum(axis=1) == 4).all()
    frequencies = np.sort(counts / counts.sum(axis=1, keepdims=True), axis=1)[:, -4:]
    np.testing.assert_allclose(
        frequencies, np.tile([1 / 8, 1 / 8, 1 / 4, 1 / 2], (16, 1)), atol=0.05
    )


def test_wrong_numbers_of_rows_and_processes(text_config):
    config = text_config()
    with pytest.raises(ValueError, match=r"batch_size=6 .*process_count=4"):
        make_iterator(config, split="train", batch_size=6, process_count=4)
    with pytest.raises(ValueError, match="batch_size=0"):
        make_iterator(config, split="train", batch_size=0)
    with pytest.raises(ValueError, match="process_index=2"):
        make_iterator(config, split="train", batch_size=4, process_index=2, process_count=2)
    with pytest.raises(ValueError, match=r"split='test'.*train, validation"):
        make_iterator(config, split="test", batch_size=4)
    count = num_windows(config, "validation")
    with pytest.raises(ValueError, match=f"{count} windows, batch_size={count + 1}"):
        make_iterator(config, split="validation", batch_size=count + 1)
