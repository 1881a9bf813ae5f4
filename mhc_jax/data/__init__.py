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

from mhc_jax.data.config import SOURCES, SPLITS, DataConfig
from mhc_jax.lazy import attach

# Imported on first use: these files need grain and array_record, a model's config does not.
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

__getattr__, __dir__ = attach(
    __name__, {name: f"{__name__}.{file}" for name, file in _LAZY.items()}
)
