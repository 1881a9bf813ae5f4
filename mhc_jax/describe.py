"""Counts the parameters of a configuration by part, without allocating any."""

import functools
import math
from typing import NamedTuple

import jax

from mhc_jax import units
from mhc_jax.analysis.runs import fixed_mappings
from mhc_jax.config import Config, ModelConfig
from mhc_jax.parameters import PARTS, path_of, rule_of
from mhc_jax.variables import init_params


class Count(NamedTuple):
    """Number of parameters of one part: all of them, and those that one token uses."""

    total: int
    active: int


def count_parameters(config: ModelConfig) -> dict[str, Count]:
    """Counts the parameters of each part; parts that the model does not have are left out.

    A token uses all parameters except the experts it does not choose and the embedding, of which it looks
    up one row (an embedding that also unembeds counts). The balance bias is no parameter and does not
    count.
    """
    shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    totals = dict.fromkeys(PARTS, 0)
    for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]:
        totals[rule_of(path_of(path)).part] += math.prod(leaf.shape)

    def active(part, total):
        if part == "embedding":
            return total * config.tie_embeddings
        if part == "routed experts":
            return total * config.experts_per_token // config.num_experts
        return total

    return {part: Count(total, active(part, total)) for part, total in totals.items() if total}


def sums(counts: dict[str, Count]) -> Count:
    """Sums the parts to those of the whole model."""
    return Count(*(sum(column) for column in zip(*counts.values())))


def describe(config: Config) -> str:
    """Returns a table of the parameters by part, and what the run would train on."""
    model = config.model
    counts = count_parameters(model)
    lines = [f"{'part':<18}{'parameters':>18}{'active':>18}"]
    lines += [f"{part:<18}{c.total:>18,}{c.active:>18,}" for part, c in counts.items()]
    whole = sums(counts)
    lines.append(f"{'all':<18}{whole.total:>18,}{whole.active:>18,}")
    lines.append(f"{'':<18}{units.count(whole.total):>18}{units.count(whole.active):>18}")
    tokens = config.batch_size * config.data.sequence_length
    lines += [
        "",
        f"{model.num_blocks} blocks of width {model.width}, connection {_connection(model)}",
        f"{config.steps:,} steps of {config.batch_size} x {config.data.sequence_length} tokens: "
        f"{units.count(config.steps * tokens)} tokens",
    ]
    return "\n".join(lines)


def _connection(model: ModelConfig) -> str:
    """Names the connection with its constraint and its switches."""
    parts = [model.connection]
    if model.connection != "residual":
        parts.append(f"n = {model.n} streams")
    fixed = fixed_mappings(vars(model))
    if model.connection == "mhc" and "h_res" not in fixed:
        parts.append(f"manifold {model.manifold}")
        parts += ["one h_res for all tokens (static_res)"] * model.static_res
    parts += ["look-ahead pre"] * model.lookahead_pre
    parts += [f"fixed {' and '.join(fixed)}"] if fixed else []
    return ", ".join(parts)
