"""Formats numbers for people: three digits and a unit that fits."""

_BINARY = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))
_SECONDS = ((1, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))
_COUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))
_SI = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""))


def size(num_bytes: float) -> str:
    """Formats bytes: "26.2 GiB", "512 KiB", "0 B"."""
    return _scaled(num_bytes, _BINARY)


def duration(seconds: float) -> str:
    """Formats seconds: "1.78 s", "435 ms", "12.3 us", "0 s"."""
    return _scaled(seconds, _SECONDS) if seconds else "0 s"


def flops(number: float) -> str:
    """Formats floating-point operations: "4.31 TFLOP", "12.0 MFLOP"."""
    return _scaled(number, _SI) + "FLOP"


def count(number: int) -> str:
    """Formats parameters or tokens: "2.97B", "612M", "48"."""
    if number < _COUNTS[-1][0]:
        return str(number)
    return _scaled(number, _COUNTS).replace(" ", "")


def _scaled(value: float, units: tuple[tuple[float, str], ...]) -> str:
    """Formats `value` in the largest of `units` in which it is at least 1, else in the smallest."""
    step, name = next((unit for unit in units if abs(value) >= unit[0]), units[-1])
    scaled = abs(value) / step
    digits = 0 if step == 1 and float(value).is_integer() else 2 - (scaled >= 10) - (scaled >= 100)
    return f"{value / step:.{digits}f} {name}"
