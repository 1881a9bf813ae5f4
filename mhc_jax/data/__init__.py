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
from mhc_jax.data.pipeline import make_iterator, num_windows, vocab_size
from mhc_jax.data.tokenizer import load_tokenizer

__all__ = [
    "SOURCES",
    "SPLITS",
    "DataConfig",
    "load_tokenizer",
    "make_iterator",
    "num_windows",
    "vocab_size",
]
