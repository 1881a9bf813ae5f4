"""Writes what `transformers` computes into *.npz beside this file: python -m tests.parity.make_golden

Needs pip install -e ".[parity]". The plain suite compares mhc_jax with these files.
"""

import pathlib

import numpy as np

from tests.parity import deepseek, deepseek_v4

PATH = pathlib.Path(__file__).with_name("deepseek_v3.npz")
PATH_V4 = PATH.with_name("deepseek_v4.npz")


def model_arrays() -> dict[str, np.ndarray]:
    """Of the tiny DeepSeek-V3, float32."""
    arrays = {}
    for arm in ("untied", "tied"):
        found = deepseek.theirs(deepseek.make_config(tied=arm == "tied"))
        # Tied differs from untied at both ends alone: what the embedding gets is enough.
        names = ("logits", "loss", "embedding/embedding") if arm == "tied" else found
        arrays |= {f"{arm}:{name}": found[name] for name in names}
    return arrays


def connection_arrays() -> dict[str, np.ndarray]:
    """Of DeepSeek-V4's connection and head, float64."""
    return {
        f"{n},{C}:{name}": x
        for n, C in deepseek_v4.SHAPES
        for name, x in deepseek_v4.theirs(n, C, "float64").items()
    }


def main() -> None:
    for path, make in ((PATH, model_arrays), (PATH_V4, connection_arrays)):
        arrays = make()
        np.savez_compressed(path, **arrays)
        print(f"{path}: {len(arrays)} arrays, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
