"""Every learned array of a model in one table: its part, its split over a mesh, its decay, its dtype in use.

A new parameter needs one line here. Without it `rule_of` raises, for everyone who asks: the sharding, the
optimizer, the train step and `--describe`.
"""

import re
from typing import Any, NamedTuple

import jax

# Logical name of a dimension, a key of `sharding.LOGICAL`; two names split it by the first, then by the
# second; None leaves it whole.
Dimension = str | tuple[str, str] | None


class Rule(NamedTuple):
    """What holds for the parameters whose whole path matches a pattern.

    Attributes:
      pattern: regular expression of the path, whose names are joined by "/".
      part: the row of `--describe` that it counts for.
      split: of the last dimensions. Those before count blocks and stay whole.
      decays: whether weight decay acts on it.
      narrow: whether it is used in the dtype of the model's products alone, so that one cast serves a step.
    """

    pattern: str
    part: str
    split: tuple[Dimension, ...] = ()
    decays: bool = False
    narrow: bool = False


def _matrix(pattern: str, part: str, *split: Dimension, narrow: bool = True) -> Rule:
    return Rule(pattern, part, split, decays=True, narrow=narrow)


_BLOCK = r"(blocks|leading/\d+)"
_CONNECTION = rf"{_BLOCK}/(attention|ffn)_connection"

# fsdp splits the rows of a matrix, never its columns: arrays of a TPU lie in tiles of 8 rows and 128 columns,
# and the columns of a share would have to be a multiple of 128 to be gathered without padding. Weight decay
# on the logits of h_res (`bias`) would drive it to J/n, on `alpha` it would switch the dynamic mappings off.
# The router's matrix is used in float32, and so are those of the connections.
RULES = (
    _matrix("embedding/embedding", "embedding", ("vocab", "rows"), None, narrow=False),
    _matrix("unembed/kernel", "unembedding", "rows", "vocab", narrow=False),
    _matrix(f"{_BLOCK}/attention/(qkv|q|kv_up)/kernel", "attention", "rows", "heads"),
    _matrix(f"{_BLOCK}/attention/kv_down/kernel", "attention", "rows", None),
    _matrix(f"{_BLOCK}/attention/out/kernel", "attention", ("heads", "rows"), None),
    Rule(f"{_BLOCK}/attention/kv_norm/scale", "attention"),
    _matrix(f"{_CONNECTION}/phi", "connections", "rows", None, narrow=False),
    _matrix(f"{_CONNECTION}/theta", "connections", narrow=False),
    Rule(f"{_CONNECTION}/(bias|alpha)", "connections"),
    _matrix("readout/phi", "connections", "rows", None, narrow=False),
    Rule("readout/(bias|alpha)", "connections"),
    _matrix(f"{_BLOCK}/ffn/router/kernel", "router", "rows", None, narrow=False),
    Rule(f"{_BLOCK}/ffn/balance_bias", "router"),
    _matrix(f"{_BLOCK}/ffn/experts/(gate|up)", "routed experts", "experts", "rows", "ffn"),
    _matrix(f"{_BLOCK}/ffn/experts/down", "routed experts", "experts", ("ffn", "rows"), None),
    _matrix(f"{_BLOCK}/ffn/shared/(gate|up)/kernel", "shared experts", "rows", "ffn"),
    _matrix(f"{_BLOCK}/ffn/shared/down/kernel", "shared experts", ("ffn", "rows"), None),
    _matrix(f"{_BLOCK}/ffn/(gate|up)/kernel", "dense FFN", "rows", "ffn"),
    _matrix(f"{_BLOCK}/ffn/down/kernel", "dense FFN", ("ffn", "rows"), None),
    Rule(f"({_BLOCK}/(attention|ffn)_)?norm/scale", "norms"),
)

# The parts in the order of `--describe`.
PARTS = tuple(dict.fromkeys(rule.part for rule in RULES))


def rule_of(path: str) -> Rule:
    """The rule for one parameter, such as "blocks/ffn/gate/kernel".

    Raises:
      ValueError: there is none.
    """
    for rule in RULES:
        if re.fullmatch(rule.pattern, path):
            return rule
    raise ValueError(f"no rule for parameter {path}: add one to RULES in mhc_jax/parameters.py")


def path_of(keys: tuple[Any, ...]) -> str:
    """Names of the dicts on the way to a leaf, joined by "/"; "" for a leaf that lies in none.

    An optimizer's trees mirror those of the parameters, and their leaves have the same path.
    """
    return "/".join(str(key.key) for key in keys if isinstance(key, jax.tree_util.DictKey))


def merged(a: dict, b: dict) -> dict:
    """Merges two nested dicts that share no leaf."""
    common = {key: merged(a[key], b[key]) for key in a.keys() & b.keys()}
    return a | b | common
