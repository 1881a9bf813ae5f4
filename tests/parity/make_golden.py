"""Writes what `transformers` computes into deepseek_v3.npz: python -m tests.parity.make_golden

Needs pip install -e ".[parity]". The plain suite compares mhc_jax with this file.
"""

import pathlib

import numpy as np

from tests.parity import deepseek

PATH = pathlib.Path(__file__).with_name("deepseek_v3.npz")


def main() -> None:
    arrays = {}
    for arm in ("untied", "tied"):
        found = deepseek.theirs(deepseek.make_config(tied=arm == "tied"))
        # Tied differs from untied at both ends alone: what the embedding gets is enough.
        names = ("logits", "loss", "embedding/embedding") if arm == "tied" else found
        arrays |= {f"{arm}:{name}": found[name] for name in names}
    np.savez_compressed(PATH, **arrays)
    print(f"{PATH}: {len(arrays)} arrays, {PATH.stat().st_size} bytes")


if __name__ == "__main__":
    main()
