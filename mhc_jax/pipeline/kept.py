"""Where what the units of a stage keep for their backward lies: which ring buffer holds which array.

What one unit gives is what the next one takes. Where both keep it, it lies in the buffer of the next one
alone, and both read it there: streams between two blocks wait once.
"""

from collections.abc import Sequence

import jax

from mhc_jax.pipeline.residuals import Split
from mhc_jax.pipeline.rings import Rings


class Kept:
    """The ring buffers of the units of a stage.

    Args:
      splits: the units in order, what follows the last one included.

    Attributes:
      shapes: of what lies in a slot, an array for each ring buffer.
    """

    def __init__(self, splits: Sequence[Split]):
        self._splits, self._shared = splits, _shared(splits)
        self.shapes = [
            shape
            for split, shared in zip(splits, self._shared, strict=True)
            for j, shape in enumerate(split.kept)
            if j not in shared
        ]

    def by_unit(self, rings: Rings) -> list[dict[int, jax.Array]]:
        """The ring buffers that each unit writes, by the place of the array in its `kept`."""
        left = iter(rings)
        return [
            {j: next(left) for j in range(len(split.kept)) if j not in shared}
            for split, shared in zip(self._splits, self._shared, strict=True)
        ]

    def read_by_unit(self, rings: Rings) -> list[Rings]:
        """The ring buffers that each unit reads, in the order of its `kept`: those of the next one too."""
        found: list[Rings] = []
        for own, shared in zip(reversed(self.by_unit(rings)), reversed(self._shared), strict=True):
            own = own | {j: found[0][other] for j, other in shared.items()}
            found.insert(0, [own[j] for j in range(len(own))])
        return found

    def for_the_one_before(self, index: int) -> dict[int, int]:
        """Which ring buffers of a unit the unit before it reads too: place in `kept` -> leaf of the input.

        They are written even where the unit itself is not there.
        """
        if not index:
            return {}
        return {j: self._splits[index].of_input[j] for j in self._shared[index - 1].values()}


def _shared(splits: Sequence[Split]) -> list[dict[int, int]]:
    """Of each unit what it and the next one both keep: place in its `kept` -> place in the next one's."""
    found = []
    for split, following in zip(splits, [*splits[1:], None], strict=True):
        places = following.of_input if following else []
        places = {leaf: j for j, leaf in enumerate(places) if leaf is not None}
        found.append({j: places[o] for j, o in enumerate(split.of_output) if o in places})
    return found
