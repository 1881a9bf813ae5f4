"""Schedules of a pipeline and the placement of blocks: properties of the tables."""

import itertools

import numpy as np
import pytest

from mhc_jax.pipeline import SCHEDULES, Placement, make_schedule, place
from mhc_jax.pipeline.schedule import device_of
from mhc_jax.pipeline.tables import make_tables
from mhc_jax.pipeline.timeline import StageTimes, microbatch_warning, simulate

SIZES = ((1, 1), (1, 5), (2, 1), (2, 4), (3, 7), (4, 8), (8, 5), (8, 32))


def ticks_of(schedule, table):
    """`[stages, M]`: the tick in which each work of a table is done."""
    found = np.full((schedule.num_stages, schedule.num_microbatches), -1)
    tick, device = np.nonzero(table[..., 0] >= 0)
    stage, microbatch = table[tick, device].T
    found[stage, microbatch] = tick
    return found


@pytest.mark.parametrize(
    ("name", "split"),
    [*((name, False) for name in SCHEDULES), ("1f1b", True), ("dualpipev", True)],
)
@pytest.mark.parametrize(("devices", "microbatches"), SIZES)
def test_every_work_runs_once_after_what_it_needs(name, split, devices, microbatches):
    schedule = make_schedule(name, devices, microbatches, split)
    stages = schedule.num_stages
    assert schedule.splits_backward == split
    for table in (schedule.forward, schedule.backward, *([schedule.matrices] if split else [])):
        found = [tuple(work) for work in table.reshape(-1, 2) if work[0] >= 0]
        assert sorted(found) == list(itertools.product(range(stages), range(microbatches)))
        for device, column in enumerate(table.swapaxes(0, 1)):
            assert all(device_of(s, devices) == device for s, _ in column if s >= 0)
    forward, backward = ticks_of(schedule, schedule.forward), ticks_of(schedule, schedule.backward)
    # What was made arrives with the next tick; the loss is part of the last forward.
    assert (forward[1:] > forward[:-1]).all()
    assert (backward[:-1] > backward[1:]).all()
    assert (backward >= forward).all()
    if split:
        # They come before the forward and the backward of their tick.
        assert (ticks_of(schedule, schedule.matrices) > backward).all()


SLOTS = {
    "num_kept": ("keep", "back_keep", "matrices_keep"),
    "num_put_off": ("back_put_off", "matrices_read"),
    "num_streams": ("read", "from_below", "from_above", "turned"),
    "num_cotangents": ("back_read", "back_from_above", "back_from_below", "back_turned", "loss"),
}


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("name", ["1f1b", "dualpipev"])
def test_every_slot_is_there(name, split):
    """To put into one that is not would be to put into another (`rings.put`)."""
    for devices, microbatches in itertools.product(range(1, 9), (1, 2, 3, 7, 8, 16, 20)):
        tables = make_tables(make_schedule(name, devices, microbatches, split))
        rows = tables.rows()
        for size, names in SLOTS.items():
            # Streams and cotangents have a slot more, for what nobody reads.
            slots = getattr(tables, size) + (size in ("num_streams", "num_cotangents"))
            for row in names:
                if row in rows and slots:
                    assert 0 <= rows[row].min() <= rows[row].max() < slots, (devices, row)


@pytest.mark.parametrize(("devices", "microbatches"), [(2, 8), (4, 8), (8, 32)])
def test_activations_in_flight(devices, microbatches):
    def peak(name):
        return make_schedule(name, devices, microbatches).peak_activations().tolist()

    assert peak("gpipe") == [microbatches] * devices
    assert peak("1f1b") == [2 * (devices - i) - 1 for i in range(devices)]
    # Of half stages.
    assert max(peak("dualpipev")) <= 3 * devices - 1


@pytest.mark.parametrize(("devices", "microbatches"), [(2, 8), (4, 8), (8, 32)])
def test_what_a_split_backward_holds(devices, microbatches):
    """1f1b no more activations than before, on any device than on the first; dualpipev half of P stages."""
    whole, split = (make_schedule("1f1b", devices, microbatches, split) for split in (False, True))
    assert split.peak_activations().max() == whole.peak_activations().max()
    assert split.peak_put_off().tolist() == [i + 1 for i in range(devices)]
    whole, split = (
        make_schedule("dualpipev", devices, microbatches, split) for split in (False, True)
    )
    assert split.peak_activations().max() <= whole.peak_activations().max() + devices // 2
    assert split.peak_put_off().max() == devices
    assert not whole.peak_put_off().any()


@pytest.mark.parametrize(("devices", "microbatches"), [(2, 4), (4, 8), (4, 32), (8, 64)])
def test_bubbles(devices, microbatches):
    def bubble(name, split=False):
        schedule = make_schedule(name, devices, microbatches, split)
        ones = np.ones(schedule.num_stages) / schedule.num_stages
        timeline = simulate(schedule, StageTimes(ones, 0 * ones, 0 * ones, 2 * ones, ones), 0.0)
        assert timeline.ideal == pytest.approx(3 * microbatches / devices)
        return timeline.seconds - timeline.ideal

    whole = 3 * (devices - 1) / devices
    assert bubble("gpipe") == pytest.approx(whole)
    assert bubble("1f1b") == pytest.approx(whole)
    assert bubble("dualpipev") == pytest.approx(2 / 3 * whole)
    assert bubble("1f1b", split=True) == pytest.approx(whole / 3)
    assert bubble("dualpipev", split=True) == pytest.approx(whole / 6)


def test_the_bubble_of_few_microbatches_is_named():
    assert microbatch_warning("1f1b", 8, 8) == microbatch_warning("dualpipev", 8, 16) == ""
    # 4 x 16 half stages of 1 + 2 behind each other are 24 of about 60.
    found = microbatch_warning("dualpipev", 8, 4)
    assert "wants at least 16 micro-batches; its bubble is about 60 %" in found
    # The default, one micro-batch: seven of eight devices idle.
    found = microbatch_warning("1f1b", 8, 1)
    assert "accumulate_steps=1 on mesh.pipe=8: 1f1b wants at least 8" in found
    assert "bubble is about 88 %" in found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("zero", 2, 2), "'zero' is unknown: use one of gpipe"),
        (("1f1b", 2, 0), "0 micro-batches"),
        (("gpipe", 2, 2, True), "pipe_split_backward=True does not go with pipe_schedule=gpipe"),
    ],
)
def test_bad_schedules(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(*arguments)


def test_blocks_are_placed_by_time():
    assert place(8, 4, "1f1b").counts == (2, 2, 2, 2)
    assert place(8, 4, "1f1b").is_identity
    # A head as long as a block takes one from the last stage; a leading block takes one from the first.
    assert place(8, 4, "1f1b", head_cost=1.1).counts == (3, 2, 2, 1)
    assert place(9, 4, "1f1b", num_leading=1).counts == (2, 2, 2, 2)
    # In a V the first device has both ends.
    assert place(9, 2, "dualpipev", head_cost=1.0).counts == (2, 3, 2, 2)
    assert place(16, 2, "dualpipev", num_leading=1, head_cost=3.0).chunk_counts().sum(
        1
    ).tolist() == [
        6,
        9,
    ]
    with pytest.raises(
        ValueError, match=r"mesh.pipe=4 under dualpipev has 8 stages, the model 7 bl"
    ):
        place(7, 4, "dualpipev")


def test_rows_of_the_padded_stack():
    placement = Placement(2, (2, 1, 2, 1))
    # Device 0 has stages 0 and 3, device 1 stages 1 and 2.
    assert placement.order.tolist() == [0, 1, 5, -1, 2, -1, 3, 4]
    assert (placement.rows, placement.chunks, placement.is_identity) == (2, 2, False)
    assert np.array_equal(placement.chunk_counts(), [[2, 1], [1, 2]])
