"""Chooses colours of arms, which colour-blind readers can tell apart if there are few."""

import colorsys
from collections.abc import Sequence

# Okabe and Ito's colours, which also differ in grey print. The first of each is the arm's own; the others
# serve when several arms have the same connection.
COLOURS = {
    "residual": ("#6B6B6B", "#A0A0A0", "#3C3C3C"),
    "hc": ("#D55E00", "#E69F00", "#CC79A7"),
    "mhc": ("#0072B2", "#56B4E9", "#009E73"),
    "identity": ("#009E73",),
}
# Tol's muted colours, for arms without a colour of their own.
_OTHERS = ("#332288", "#117733", "#882255", "#999933", "#44AA99", "#DDCC77", "#AA4499")


def family(name: str) -> str:
    """Returns the connection that an arm's name begins with: "mHC (seed 1)" -> "mhc"; "" for none."""
    name = name.strip().lower()
    found = (key for key in sorted(COLOURS, key=len, reverse=True) if name.startswith(key))
    return next(found, "")


def choose(names: Sequence[str]) -> list[str]:
    """Returns different hexadecimal colours. The first arm of a connection has the connection's own."""
    chosen: list[str] = []
    # A connection's first colour stays reserved for it, however many arms come before.
    spare = [
        c for own in COLOURS.values() for c in own[1:] if c not in {o[0] for o in COLOURS.values()}
    ]
    for name in names:
        candidates = [*COLOURS.get(family(name), ()), *_OTHERS, *spare]
        free = [colour for colour in candidates if colour not in chosen]
        chosen.append(free[0] if free else _from_the_wheel(len(chosen)))
    return chosen


def _from_the_wheel(index: int) -> str:
    """Yields hues a golden section apart, light and dark in turn."""
    rgb = colorsys.hls_to_rgb(index * 0.618 % 1, (0.35, 0.6)[index % 2], 0.75)
    return "#" + "".join(f"{round(255 * part):02X}" for part in rgb)
