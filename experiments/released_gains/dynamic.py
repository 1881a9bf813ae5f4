"""Reads the mappings of a `transformers` DeepSeek-V4 on a text, through hooks on its connections."""

import pathlib
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from mhc_jax.gains import stream_cosine

_CONNECTION = re.compile(r"(?:^|\.)layers\.(\d+)\.(attn|ffn)_hc$")


class Dynamic(NamedTuple):
    """Holds the mappings of L sublayers, in the order of execution, for T tokens.

    Attributes:
      names: "layers.3.attn", ...
      h_pre, h_post: `[L, T, n]` float32.
      h_res: `[L, T, n, n]` float32, entry (i, j) from stream j into stream i.
      stream_cosine: `[L]`, mean cosine between the streams that each sublayer reads.
    """

    names: list[str]
    h_pre: np.ndarray
    h_post: np.ndarray
    h_res: np.ndarray
    stream_cosine: np.ndarray


def load(name: str):
    """Loads (tokenizer, model) of a folder or a name, in the dtype of its files, on the CPU.

    Raises:
      ValueError: in one line: packages that are not installed, no such model, another architecture.
    """
    try:
        import torch  # noqa: F401
        import transformers
    except ImportError as error:
        raise ValueError(f"--model needs {error.name}: pip install torch transformers") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = transformers.AutoModel.from_pretrained(name, dtype="auto")
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--model={name}: {str(error).strip().splitlines()[0]}") from None
    if not _connections(model):
        raise ValueError(f"--model={name}: {type(model).__name__} has no attn_hc and ffn_hc")
    return tokenizer, model.eval()


def _connections(model) -> list[tuple[str, object]]:
    """Returns (name, module) in the order of execution."""
    found = []
    for name, module in model.named_modules():
        if match := _CONNECTION.search(name):
            found.append((int(match[1]), match[2], module))
    return [(f"layers.{k}.{kind}", m) for k, kind, m in sorted(found, key=lambda one: one[:2])]


def mappings(
    tokenizer, model, text: pathlib.Path, max_tokens: int, progress: Callable[[int], Iterable]
) -> Dynamic:
    """Runs the model once on the beginning of the text and keeps what its connections return.

    Args:
      tokenizer, model: from `load`.
      text: a file.
      max_tokens: of its beginning.
      progress: `progress(L)` has `update(1)` and `close()`, as a tqdm bar.

    Raises:
      ValueError: no text, or no token in it.
    """
    import torch
    import torch.nn.functional as F

    try:
        with text.open() as file:
            content = file.read(16 * max_tokens)  # letters, more than there are in so many tokens
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--text={text} cannot be read: {error}") from None
    tokens = tokenizer(content, return_tensors="pt")["input_ids"][:, :max_tokens]
    if not tokens.numel():
        raise ValueError(f"--text={text} has no tokens")
    connections, found = _connections(model), {}
    bar = progress(len(connections))

    def keep(name):
        def hook(module, inputs, outputs):
            post, comb, _ = outputs
            (streams,) = inputs
            n = module.hc_mult
            normed = module.input_norm(streams.flatten(2).float())
            pre = F.linear(normed, module.fn[:n].float()) * module.scale[0] + module.base[:n]
            pre = torch.sigmoid(pre) + module.hc_eps  # which the module does not return
            # It applies comb transposed.
            arrays = (pre, post, comb.transpose(-1, -2))
            flat = jnp.asarray(streams.flatten(2).float().numpy())
            cosine = np.asarray(stream_cosine(flat, n))
            found[name] = [*(x.flatten(0, 1).float().numpy().copy() for x in arrays), cosine]
            bar.update(1)

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in connections]
    try:
        with torch.no_grad():
            model(tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        bar.close()
    names = [name for name, _ in connections]
    return Dynamic(names, *(np.stack([found[name][k] for name in names]) for k in range(4)))
