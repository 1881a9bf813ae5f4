"""Says which values of a recompute block are stored, as policies for `jax.checkpoint`."""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

POLICIES = ("none", "mhc", "full", "offload")

# The tag of what F stores. Libraries that name their own residuals get this name (splash attention:
# `residual_checkpoint_name`).
KEEP_NAME = "layer_function"
_BLOCK_INPUT = "recompute_block_input"

# cuDNN's fused attention (output and softmax statistics), whose results cannot be named.
_FUSED_ATTENTION = ("dot_product_attention_fwd", "dot_product_attention_fwd_wrapper")


def keep(x: jax.Array) -> jax.Array:
    """Returns x, any array, marked as a matmul or attention output inside F, which `mhc` stores."""
    return checkpoint_name(x, KEEP_NAME)


def tag_block_input(streams: Any) -> Any:
    """Marks the input of a recompute block, which `offload` moves to the host."""
    return checkpoint_name(streams, _BLOCK_INPUT)


def _is_output_of_layer_function(primitive, *_, **params) -> bool:
    """Returns whether F made this value by a matmul or attention.

    Not every dot belongs to F: the "xla" projection of mHC is a dot and is computed again, so F's matmuls
    need the tag of `keep`. Dots with batch dimensions are those of unfused attention, inside a library
    without tags; the operations of mHC have no such dots.
    """
    if primitive.name == "name":
        return params["name"] == KEEP_NAME
    if primitive.name == "dot_general":
        (_, _), (batch, _) = params["dimension_numbers"]
        return bool(batch)
    return primitive.name in _FUSED_ATTENTION


def checkpoint(function: Callable, policy: str, *, in_scan: bool) -> Callable:
    """Puts `function` under `jax.checkpoint` with one of POLICIES.

    Args:
      function: what is computed again.
      policy: one of POLICIES, not "none".
      in_scan: whether it is the body of a `lax.scan`. Forward and backward are then two loops, which XLA
        cannot merge, so no barrier is needed.
    """
    saved = {
        "mhc": _is_output_of_layer_function,
        "full": jax.checkpoint_policies.nothing_saveable,
        "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[_BLOCK_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[policy]
    return jax.checkpoint(function, policy=saved, prevent_cse=not in_scan)
