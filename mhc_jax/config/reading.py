"""Makes a configuration from a nested mapping."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

from mhc_jax.config.run import Config


def from_dict(values: Mapping[str, Any], kind: type = Config, prefix: str = ""):
    """Builds a frozen configuration from a nested mapping such as a ConfigDict or config.json.

    Raises:
      ValueError: a field that does not exist (with the nearest that does), a missing one, or a value out
        of range.
      TypeError: a value of another type than the field's.
    """
    fields = {field.name: field.type for field in dataclasses.fields(kind)}
    for name in values:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f": did you mean {prefix}{near[0]}?" if near else ""
            raise ValueError(f"unknown config field {prefix}{name}{hint}")
    missing = [prefix + name for name in fields if name not in values]
    if missing:
        raise ValueError(f"missing config fields: {', '.join(missing)}")
    return kind(
        **{name: _convert(prefix + name, values[name], type_) for name, type_ in fields.items()}
    )


def _convert(path: str, value: Any, type_: Any):
    if dataclasses.is_dataclass(type_):
        return from_dict(value, type_, path + ".")
    allowed = typing.get_args(type_) if isinstance(type_, types.UnionType) else (type_,)
    if value == "None" and types.NoneType in allowed:
        return None  # as it is written on a command line, where every value is text
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) not in allowed:
        names = " or ".join(t.__name__ for t in allowed)
        raise TypeError(f"{path}={value!r} is {type(value).__name__}, expected {names}")
    return value
