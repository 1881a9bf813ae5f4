"""The model at work on one device: scoring text, and continuing prompts of different lengths in batches.

    model = Inference(variables, config.model)
    for index, found in model.score([(context, continuation), ...]): ...
    for index, ids in model.generate(prompts, max_tokens=64, is_done=lambda index, ids: ...): ...

Sequences are sorted by length and cut into batches of a few lengths, so that a task compiles six programs at
most: `score` one a length, `generate` two (prefill and decode) for each of three. Padding stands behind the
tokens, where causality hides it; `prefill` takes it on either side.

`prefill`, `decode` and `token_scores` are the pure functions below.
"""

from mhc_jax.inference.batches import Inference, choose_lengths
from mhc_jax.inference.drawing import (
    Batch,
    check_draws,
    check_prompt,
    draw,
    keys_of,
    proceed,
    start,
)
from mhc_jax.inference.steps import (
    DecodeState,
    cast_weights,
    decode,
    for_sampling,
    init_decode,
    prefill,
    token_scores,
)

__all__ = [
    "Batch",
    "DecodeState",
    "Inference",
    "cast_weights",
    "check_draws",
    "check_prompt",
    "choose_lengths",
    "decode",
    "draw",
    "for_sampling",
    "init_decode",
    "keys_of",
    "prefill",
    "proceed",
    "start",
    "token_scores",
]
