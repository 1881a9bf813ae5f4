"""Random configurations: those in their ranges can be traced, the others are refused in one line."""

import dataclasses
import functools
import typing

import jax
import numpy as np
import pytest

from configs import default
from mhc_jax import ranges
from mhc_jax.config import Config, from_dict
from mhc_jax.initialisation import read_logit
from mhc_jax.train import check_config
from mhc_jax.train_step import abstract_batch, abstract_state, train_step


def numbers(kind=Config, prefix=""):
    """Dotted name -> type of every field that is a number."""
    found = {}
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            found |= numbers(field.type, f"{prefix}{field.name}.")
        elif {int, float} & {field.type, *typing.get_args(field.type)}:
            found[prefix + field.name] = int if field.type is int else float
    return found


def flat(values, prefix=""):
    """Dotted name -> value of a nested mapping."""
    found = {}
    for name, value in values.items():
        inner = isinstance(value, dict)
        found |= flat(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return found


def test_every_number_has_one_range_with_its_default_inside():
    defaults = flat(default.get_config().to_dict())
    assert list(ranges.RANGES) == list(numbers())
    for name, kind in numbers().items():
        allowed = ranges.RANGES[name]
        assert {type(allowed.least), type(allowed.most)} == {kind}, name
        assert defaults[name] in allowed or defaults[name] == "auto", name


# Toy sizes of what a trace depends on, fit for each other; everything else is drawn from its range.
SIZES = {
    "steps": [10, 1000], "batch_size": [2, 6], "model.num_blocks": [2, 3], "model.width": [8, 12],
    "model.num_heads": [1, 2], "model.head_dim": [3, 8], "model.rope_dim": [2, 4], "model.kv_rank": [1, 5],
    "model.ffn_width": [1, 8], "model.num_experts": [0, 0, 3, 4], "model.experts_per_token": [1, 2, 3],
    "model.shared_experts": [0, 2], "model.expert_width": [1, 8], "model.leading_dense_blocks": [0, 1],
    "model.n": [1, 2, 3], "model.pre_init_gap": [0.5, 100.0], "model.sinkhorn_iterations": [1, 4],
    "model.loss_chunks": [1, 2],
    "model.vocab_size": [12, 16], "optimizer.warmup_steps": [0, 2, 9],
    "optimizer.accumulate_steps": [1, 1, 2], "data.sequence_length": [2, 6],
    "data.synthetic_vocab_size": [8, 12], "eval_batches": [1, 3],
    "mesh.data": [1, -1],
    **{f"mesh.{axis}": [1] for axis in ("pipe", "fsdp", "expert", "tensor", "sequence")},
}  # fmt: skip
CHOICES = {
    "model.connection": ["residual", "hc", "mhc", "mhc"], "model.attention": ["mha", "mla"],
    "model.moe_dispatch": ["auto", "dropless", "capacity"], "model.tie_embeddings": [True, False],
    "model.dtype": ["float32", "bfloat16"], "model.readout": ["sum", "mean", "head"],
    "model.manifold": ["birkhoff", "identity"], "model.remat": ["none", "none", "mhc", "full"],
    "model.recompute_block": ["auto", "2"], "model.scan_blocks": [True, False],
    "optimizer.schedule": ["constant", "step", "cosine", "wsd"],
}  # fmt: skip


def inside(rng, name):
    allowed = ranges.RANGES[name]
    if name in SIZES:
        return SIZES[name][rng.integers(len(SIZES[name]))]
    if isinstance(allowed.least, int):
        return int(
            rng.choice([allowed.least, allowed.most, rng.integers(allowed.least, allowed.most)])
        )
    ends = [1e-9, 1 - 1e-9] if allowed.exclusive else [allowed.least, allowed.most]
    return float(rng.choice([*ends, min(max(10.0 ** rng.uniform(-9, 0), ends[0]), ends[1])]))


def outside(rng, name):
    allowed = ranges.RANGES[name]
    step = 1 if isinstance(allowed.least, int) else 1e-3 + 0.1 * allowed.most
    below = allowed.least - step * (3 if allowed.besides == -1 else 1)
    wrong = [below, allowed.most + step, "3", None]
    wrong += [-(10**9), 10**12] if step == 1 else [float("nan"), float("inf"), float("-inf")]
    if allowed.exclusive:
        wrong += [allowed.least, allowed.most]
    return wrong[rng.integers(len(wrong))]


def drawn(seed):
    """The fields of a random configuration, and the one that is out of its range (None: none is)."""
    rng = np.random.default_rng(seed)
    fields = {name: inside(rng, name) for name in ranges.RANGES}
    fields |= {name: values[rng.integers(len(values))] for name, values in CHOICES.items()}
    fields |= {"data.source": "synthetic", "tensorboard": False}
    if fields["model.connection"] != "mhc":
        fields["model.manifold"] = "birkhoff"  # another one would do nothing, and is refused
    names = list(ranges.RANGES)
    bad = names[seed // 2 % len(names)] if seed % 2 else None
    if bad:
        fields[bad] = outside(rng, bad)
    return fields, bad


def nested(fields):
    values = default.get_config().to_dict()
    for name, value in fields.items():
        section, _, key = name.rpartition(".")
        (values[section] if section else values)[key] = value
    return values


def accepted(seed):
    """The configuration of a seed, or None where it was refused, as it should be."""
    fields, bad = drawn(seed)
    if not bad:
        config = from_dict(nested(fields))
        check_config(config)
        return config
    with pytest.raises((ValueError, TypeError)) as caught:
        from_dict(nested(fields))
    assert f"{bad}={fields[bad]!r} " in str(caught.value)
    assert "\n" not in str(caught.value)
    return None


def trace(config):
    step = functools.partial(train_step, config=config)
    jax.eval_shape(step, abstract_state(config), abstract_batch(config))


@pytest.mark.slow
def test_random_configurations():
    """Of 200 every second has one field out of range. A trace takes a second: of a few."""
    configs = [config for config in map(accepted, range(200)) if config]
    assert len(configs) == 100
    for config in configs[:5]:
        trace(config)


@pytest.mark.slow
def test_all_random_configurations_are_traced():
    for config in map(accepted, range(200)):
        if config:
            trace(config)


def test_read_logits_of_any_gap():
    assert read_logit(1, 3.0) == 3
    for n, gap in [(2, 0.0), (3, 0.1), (4, 4.0), (256, 100.0), (4, 1e4)]:
        others = (n - 1) / (1 + np.exp(np.longdouble(gap)))
        read = 1 / (1 + np.exp(-np.longdouble(read_logit(n, gap))))
        np.testing.assert_allclose(float(others + read), 1, rtol=1e-12)
    config = from_dict(
        nested({"model.n": 4, "model.pre_init_gap": 0.5, "data.source": "synthetic"})
    )
    with pytest.raises(
        ValueError, match=r"^model\.n=4 with pre_init_gap=0\.5: .* raise pre_init_gap"
    ):
        check_config(config)
