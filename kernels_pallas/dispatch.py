"""Which backend runs an operation: one file a backend, one rule for choosing.

Every folder of an operation holds `reference.py` ("xla", the definition) and may hold `tpu.py` ("pallas")
and `gpu.py` ("triton"). A backend file has functions with the names and signatures of the reference's
(`forward`, `backward`), and `check(*args, **static)` that raises NotImplementedError with the offending
number for what the kernel does not take.
"""

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable

import jax

from kernels_pallas import sharding

IMPLEMENTATIONS = ("xla", "pallas", "triton")
_FILES = {"xla": "reference", "pallas": "tpu", "triton": "gpu"}
_PLATFORMS = {"pallas": "tpu", "triton": "cuda"}

_log = logging.getLogger(__name__)


def validate(implementation: str | None) -> None:
    """Raises ValueError unless `implementation` is None or a known name."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        names = ", ".join(IMPLEMENTATIONS)
        raise ValueError(
            f"implementation={implementation!r} is unknown: use None or one of {names}"
        )


def check_platform(implementation: str | None, platform: str) -> None:
    """Raises NotImplementedError if kernels named `implementation` cannot run on devices of `platform`.

    Args:
      implementation: as in `run`.
      platform: of the devices, `jax.Device.platform`: "cpu", "gpu" or "tpu".
    """
    validate(implementation)
    needs = {"pallas": "tpu", "triton": "gpu"}.get(implementation, platform)
    if needs != platform:
        raise NotImplementedError(
            f"implementation={implementation!r} needs a {needs.upper()}, the devices here are "
            f"{platform.upper()}s: use None, the best of the platform, or 'xla'"
        )
    if implementation == "triton" and _missing_package():
        raise NotImplementedError(f"implementation='triton' cannot run: {_missing_package()}")


@functools.cache
def _missing_package() -> str | None:
    for package in ("triton", "jax_triton"):
        if importlib.util.find_spec(package) is None:
            return f"the package {package} is not installed (pip install -e '.[gpu]')"
    if os.environ.get("TRITON_INTERPRET") != "1":  # the interpreter needs no CUDA
        try:
            importlib.import_module("jax_triton")
        except ImportError:  # as on an installation of jax without CUDA
            return "jax_triton needs jax with CUDA (pip install -e '.[gpu]')"
    return None


@functools.cache
def _has_compiler(implementation: str) -> bool:
    """Whether programs can be compiled here for the platform of this implementation.

    Tracing kernels that could never be compiled would only slow `implementation=None` down.
    """
    return implementation != "pallas" or importlib.util.find_spec("libtpu") is not None


@functools.cache
def _unavailable(op: str, direction: str, implementation: str) -> str | None:
    """Why this backend of this operation cannot run on this installation, or None if it can."""
    if importlib.util.find_spec(f"kernels_pallas.{op}.{_FILES[implementation]}") is None:
        return f"{op} has no {implementation!r} kernel yet"
    if implementation == "triton" and _missing_package():
        return _missing_package()
    if not hasattr(_backend(op, implementation), direction):
        return f"{op} has no {implementation!r} kernel for {direction!r} yet"
    return None


def _backend(op: str, implementation: str):
    return importlib.import_module(f"kernels_pallas.{op}.{_FILES[implementation]}")


def _kernel(op: str, direction: str, backend, static: dict) -> Callable:
    """The function of a kernel backend, per device if tokens are sharded."""
    function = functools.partial(getattr(backend, direction), **static)
    return sharding.per_device(getattr(_backend(op, "xla"), direction), function)


@functools.cache
def _say_once(op: str, names: tuple[str, ...]) -> None:
    _log.info("%s: implementation %s", op, " or ".join(names) + " (by platform)" * (len(names) > 1))


def run(op: str, direction: str, implementation: str | None, *args, **static):
    """Calls `direction` ("forward", "backward", ...) of operation `op` on the chosen backend.

    With `implementation=None` the choice falls when the program is lowered, on the platform that it is
    lowered for: `jax.default_backend()` is "cpu" while a program is compiled for a TPU.

    Raises:
      NotImplementedError: a named implementation cannot run here or does not take these arguments.
    """
    validate(implementation)
    if implementation is not None:
        why_not = _unavailable(op, direction, implementation)
        if why_not:
            raise NotImplementedError(f"implementation={implementation!r} cannot run: {why_not}")
        backend = _backend(op, implementation)
        if implementation == "xla":
            return getattr(backend, direction)(*args, **static)
        backend.check(*args, **static)
        return _kernel(op, direction, backend, static)(*args)

    branches: dict[str, Callable] = {}
    for name, platform in _PLATFORMS.items():
        if not _has_compiler(name) or _unavailable(op, direction, name) is not None:
            continue
        backend = _backend(op, name)
        try:
            backend.check(*args, **static)
        except NotImplementedError as error:
            _log.info("%s: %s does not take these arguments (%s); xla runs", op, name, error)
            continue
        branches[platform] = _kernel(op, direction, backend, static)
    default = functools.partial(getattr(_backend(op, "xla"), direction), **static)
    _say_once(op, tuple(name for name in _PLATFORMS if _PLATFORMS[name] in branches) + ("xla",))
    if not branches:
        return default(*args)
    return jax.lax.platform_dependent(*args, default=default, **branches)
