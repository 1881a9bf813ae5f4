"""Imports names of a package on first use."""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def attach(package: str, places: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable]:
    """Returns `__getattr__` and `__dir__` of a package.

        __getattr__, __dir__ = attach(__name__, {"Readout": "mhc_jax.readout"})

    Args:
      package: its `__name__`.
      places: name -> absolute name of the module that has it.
    """
    names = vars(sys.modules[package])

    def getattr_(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        names[name] = getattr(importlib.import_module(places[name]), name)
        return names[name]

    def dir_() -> list[str]:
        return sorted({*names, *places})

    return getattr_, dir_
