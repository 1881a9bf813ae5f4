"""The model at work: scoring text, and continuing prompts of different lengths in batches.

    model = Inference(variables, config.model)
    for index, found in model.score([(context, continuation), ...]): ...
    for index, ids in model.generate(prompts, max_tokens=64, is_done=lambda index, ids: ...): ...

Sequences are sorted by length and cut into batches of a few lengths, so that a task compiles six programs at
most: `score` one a length, `generate` two (prefill and decode) for each of three. (Pairs of which some have
one token to come and others more are read by two kinds of programs, six each.) Padding stands behind the
tokens, where causality hides it; `prefill` takes it on either side. A mesh splits the work over devices as
in training.

`prefill`, `decode`, `token_scores` and `choice_scores` are the pure functions below.
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
from mhc_jax.inference.meshes import make_mesh
from mhc_jax.inference.scoring import choice_scores, token_scores
from mhc_jax.inference.steps import (
    DecodeState,
    blocks_apart,
    cast_weights,
    decode,
    for_decoding,
    for_sampling,
    init_decode,
    prefill,
    state_apart,
)

__all__ = [
    "Batch",
    "DecodeState",
    "Inference",
    "blocks_apart",
    "cast_weights",
    "check_draws",
    "check_prompt",
    "choice_scores",
    "choose_lengths",
    "decode",
    "draw",
    "for_decoding",
    "for_sampling",
    "init_decode",
    "keys_of",
    "make_mesh",
    "prefill",
    "proceed",
    "start",
    "state_apart",
    "token_scores",
]
