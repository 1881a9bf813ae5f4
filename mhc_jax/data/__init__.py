"""Token batches for language-model training.

```python
config = DataConfig(
    source="stdlib",
    path="",
    tokenizer="byte",
    sequence_length=512,
    validation_fraction=0.05,
    shuffle_seed=0,
    synthetic_vocab_size=64,
)
train = make_iterator(config, split="train", batch_size=32)
batch = next(train)  # {"inputs": int32 [32, 512], "targets": int32 [32, 512]}
state = train.get_state()  # a small JSON-able dict: the position and what it belongs to
```
"""

import importlib

from mhc_jax.data.config import SOURCES, SPLITS, DataConfig

# Read when they are asked for: these files need grain and array_record, a model's config does not.
_LAZY = {
    "check_files": "sources",
    "load_tokenizer": "tokenizer",
    "make_iterator": "pipeline",
    "num_windows": "pipeline",
    "vocab_size": "pipeline",
}

__all__ = [
    "SOURCES",
    "SPLITS",
    "DataConfig",
    "check_files",
    "load_tokenizer",
    "make_iterator",
    "num_windows",
    "vocab_size",
]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
