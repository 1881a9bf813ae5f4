"""What a figure of gains is given: {name: gains}, one entry an arm; its seeds, its colour."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from mhc_jax.analysis import colours
from mhc_jax.gains import GainMagnitudes

Seeds = GainMagnitudes | Sequence[GainMagnitudes]
Colours = Mapping[str, str] | None


def by_seed(gains: Mapping[str, Seeds]) -> dict[str, list[GainMagnitudes]]:
    """Returns {name: [seed, ...]}.

    Raises:
      ValueError: it is no dict, is empty, holds what is no gains, or seeds of different shapes.
    """
    if not isinstance(gains, Mapping):
        raise ValueError(f"give a dict {{name: gains}}, not {type(gains).__name__}")
    found = {}
    for name, seeds in gains.items():
        several = isinstance(seeds, Iterable) and not isinstance(seeds, GainMagnitudes)
        seeds = list(seeds) if several else [seeds]
        for one in seeds:
            if not isinstance(one, GainMagnitudes):
                raise ValueError(
                    f"{name}: got {type(one).__name__}, not gains: make them with gains_of, gains_of_run, "
                    "static_gains or gain_magnitudes"
                )
        shapes = {np.shape(one.matrix_single) for one in seeds}
        if len(shapes) != 1:
            what = f"seeds of different shapes, {sorted(shapes)}" if shapes else "no seed"
            raise ValueError(f"{name}: {what}; one arm needs equal sublayers and streams")
        found[str(name)] = seeds
    if not found:
        raise ValueError("there is nothing to draw: give {name: gains}")
    return found


def with_streams(gains: Mapping[str, Seeds]) -> dict[str, list[GainMagnitudes]]:
    """Returns `by_seed` without the arms of one stream, which cannot mix, unless there are no others."""
    arms = by_seed(gains)
    several = {n: seeds for n, seeds in arms.items() if np.shape(seeds[0].matrix_single)[-1] > 1}
    return several or arms


def is_static(arms: Mapping[str, Sequence[GainMagnitudes]]) -> bool:
    """Returns whether no mapping differs between tokens, as in `static_gains`: there is no mean over them."""
    return not any(
        np.any(np.asarray(one.matrix_std) != 0) for seeds in arms.values() for one in seeds
    )


def colours_of(names: Sequence[str], given: Colours) -> dict[str, str]:
    """Returns {name: hexadecimal}: the given colour, else the arm's own."""
    given = given or {}
    return {name: given.get(name, own) for name, own in zip(names, colours.choose(names))}
