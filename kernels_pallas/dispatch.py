"""Decides which backend runs an operation: one file a backend, one rule for choosing.

| implementation | file of an operation | |
|---|---|---|
| "xla" | `reference.py` | plain jnp, the definition; runs everywhere |
| "pallas" | `tpu.py` | Pallas for TPUs |
| "triton" | `triton.py` | Triton alone |
| "cuda" | `cuda.py` | passes over the streams in CUDA C++, the operation's small kernels in Triton |

None takes the best implementation that the platform has for the operation and its arguments, and says so once
in the log. A named one runs or raises NotImplementedError; it never means another. Names may differ by
operation, written as
text: "boundary=cuda,sinkhorn=triton". Operations that the text leaves out take None. `kernels_pallas.explain`
says what None takes, and why not the others.

A backend file has functions with the names and signatures of the reference's (`forward`, `backward`). Its
`check(*args, **static)` raises NotImplementedError, naming the value that its kernels refuse. A direction
that refuses more has a `check_<direction>` of its own.

Kernels are called `mhc_<op>_<direction>` on every platform, and what they do in addition follows:
`mhc_pre_forward_normed`, `mhc_read_backward_sums`. Profiles find them by these names.
"""

import contextlib
import contextvars
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax

from kernels_pallas import sharding
from kernels_pallas.platform_guard import require_platform

IMPLEMENTATIONS = ("xla", "pallas", "triton", "cuda")
_FILES = {"xla": "reference", "pallas": "tpu", "triton": "triton", "cuda": "cuda"}
# Kernels by the platform of a device ("gpu") and of a lowering ("cuda"), the best first.
KERNELS = {"tpu": ("pallas",), "gpu": ("cuda", "triton")}
_LOWERING = {"tpu": "tpu", "gpu": "cuda"}
_LEAST_CAPABILITY = 80  # of a GPU, times 10: Ampere. A T4 has 7.5.
# Operation -> the folder that holds it.
OPS = {
    "projection": "projection",
    "coefficients": "coefficients",
    "sinkhorn": "sinkhorn",
    "pre": "pre",
    "post_res": "post_res",
    "read": "boundary",
    "boundary": "boundary",
    "read_logits": "logits",
    "boundary_logits": "logits",
    "look_ahead": "look_ahead",
    "hc_read": "hc",
    "hc_boundary": "hc",
}

_log = logging.getLogger(__name__)


class Decision(NamedTuple):
    """What `run` decided for `implementation=None`.

    Attributes:
      op, direction: as `OPS` and the functions of a backend name them.
      why_not: implementation -> why it cannot run, None if it can. The platform does not count.
    """

    op: str
    direction: str
    why_not: dict[str, str | None]


_decisions: contextvars.ContextVar[list[Decision] | None] = contextvars.ContextVar(
    "decisions", default=None
)


@contextlib.contextmanager
def recording() -> Iterator[list[Decision]]:
    """Yields a list that receives the decisions of all operations that are traced inside."""
    decisions: list[Decision] = []
    token = _decisions.set(decisions)
    try:
        yield decisions
    finally:
        _decisions.reset(token)


@functools.cache
def implementations(op: str) -> tuple[str, ...]:
    """Returns the implementations of an operation of `OPS`."""
    folder = f"kernels_pallas.{OPS[op]}"
    return tuple(
        name for name in IMPLEMENTATIONS if importlib.util.find_spec(f"{folder}.{_FILES[name]}")
    )


def by_op(implementation: str | None) -> dict[str, str | None]:
    """Reads None, one name, or "op=name,op=name" into a name for each operation of `OPS`.

    Raises:
      ValueError: an operation or implementation does not exist, an operation is named twice, or it has no
        kernel of that name. One name for all may be missing for some operations: these raise when they are
        called.
    """
    if implementation is not None and not isinstance(implementation, str):
        raise ValueError(f"implementation={implementation!r} is unknown: it must be None or text")
    return _by_op(implementation)


@functools.cache
def _by_op(implementation: str | None) -> dict[str, str | None]:
    if implementation is None or implementation in IMPLEMENTATIONS:
        return dict.fromkeys(OPS, implementation)
    names: dict[str, str | None] = {}
    given = f"implementation={implementation!r}"
    for part in implementation.split(","):
        op, equals, name = (text.strip() for text in part.partition("="))
        if not equals:
            raise ValueError(
                f"{given} is unknown: use None, one of {', '.join(IMPLEMENTATIONS)}, or names by "
                "operation as in 'boundary=cuda,sinkhorn=triton'"
            )
        if op not in OPS:
            raise ValueError(f"{given}: {op!r} is no operation, use {', '.join(OPS)}")
        if op in names:
            raise ValueError(f"{given} names {op} twice")
        if name not in IMPLEMENTATIONS:
            raise ValueError(f"{given}: {name!r} is unknown, use {', '.join(IMPLEMENTATIONS)}")
        if name not in implementations(op):
            raise ValueError(f"{given}: {_has_none(op, name)}")
        names[op] = name
    return dict.fromkeys(OPS) | names


def _has_none(op: str, name: str) -> str:
    return f"{op} has no {name!r} kernel, it has {', '.join(implementations(op))}"


def check_model(implementation: str | None) -> None:
    """Raises ValueError if an operation of a whole model does not have this `implementation`."""
    names = by_op(implementation)
    without = [op for op, name in names.items() if name and name not in implementations(op)]
    if without:
        some = ",".join(f"{op}={implementation}" for op in OPS if op not in without)
        raise ValueError(
            f"implementation={implementation!r}: {', '.join(without)} have no such kernel; name the "
            f"operations that have: {some!r}"
        )


def check_platform(implementation: str | None, platform: str) -> None:
    """Raises NotImplementedError if kernels that `implementation` names cannot run on these devices.

    Args:
      implementation: as in `run`.
      platform: of the devices, `jax.Device.platform`: "cpu", "gpu" or "tpu".
    """
    for op, name in by_op(implementation).items():
        for needs, kernels in KERNELS.items():
            if name in kernels and needs != platform:
                raise NotImplementedError(
                    f"implementation={implementation!r}: {name} needs a {needs.upper()}, the devices "
                    f"here are {platform.upper()}s: use None, the best of the platform, or 'xla'"
                )
        why_not = name and (_unavailable(op, None, name) or _too_old(name))
        if why_not:
            raise NotImplementedError(f"implementation={implementation!r} cannot run: {why_not}")


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
def _missing_compiler(implementation: str) -> str | None:
    """Says why no program can be compiled here for the platform of this implementation.

    `implementation=None` then does not trace its kernels, which takes time.
    """
    if implementation == "pallas" and importlib.util.find_spec("libtpu") is None:
        return "libtpu is not installed (pip install -e '.[tpu]')"
    return None


def missing_for(platform: str) -> str | None:
    """Says which package the kernels of "gpu" or "tpu" lack here; None if they have all."""
    if platform == "gpu":
        return _missing_package()
    return _missing_compiler("pallas") if platform == "tpu" else None


@functools.cache
def _unavailable(op: str, direction: str | None, implementation: str) -> str | None:
    """Says why this backend of this operation cannot run on this installation; None if it can."""
    if implementation not in implementations(op):
        return _has_none(op, implementation)
    if implementation in KERNELS["gpu"] and _missing_package():
        return _missing_package()
    if direction and not hasattr(_backend(op, implementation), direction):
        return f"{op} has no {implementation!r} kernel for {direction!r}"
    return None


def _too_old(implementation: str) -> str | None:
    """Says why the GPUs of this process cannot run an installed kernel; None if they can, or without one."""
    if implementation not in KERNELS["gpu"]:
        return None
    capability = importlib.import_module("kernels_pallas.gpu.device").capability()
    if capability < _LEAST_CAPABILITY:
        return (
            f"compute capability {capability / 10}: the GPU kernels need {_LEAST_CAPABILITY / 10}, the first "
            "with bfloat16"
        )
    return None


def _why_not(op: str, direction: str, implementation: str, args, static: dict) -> str | None:
    """Says why this backend cannot run with these arguments, whatever the platform; None if it can."""
    why_not = _unavailable(op, direction, implementation) or _too_old(implementation)
    if why_not:
        return why_not
    backend = _backend(op, implementation)
    check = getattr(backend, f"check_{direction}", backend.check)
    try:
        check(*sharding.on_device(_definition(op, direction), args), **static)
    except NotImplementedError as error:
        return str(error)
    return None


def _backend(op: str, implementation: str):
    return importlib.import_module(f"kernels_pallas.{OPS[op]}.{_FILES[implementation]}")


def _definition(op: str, direction: str) -> Callable:
    return getattr(_backend(op, "xla"), direction)


def _kernel(op: str, direction: str, implementation: str, static: dict) -> Callable:
    """Returns the function of a kernel backend, per device if tokens are sharded."""
    function = functools.partial(getattr(_backend(op, implementation), direction), **static)
    return sharding.per_device(_definition(op, direction), function)


@functools.cache
def _say_once(op: str, direction: str, taken: tuple[tuple[str, str], ...]) -> None:
    kernels = "".join(f"{name} on {platform.upper()}s, " for platform, name in taken)
    _log.info("%s, %s: %sxla%s", op, direction, kernels, " elsewhere" * bool(taken))


@functools.cache
def _say_why_once(op: str, direction: str, implementation: str, why_not: str) -> None:
    _log.info("%s, %s: not %s (%s)", op, direction, implementation, why_not)


def run(op: str, direction: str, implementation: str | None, *args, **static):
    """Calls a function of operation `op` on the chosen backend.

    With `implementation=None` the choice is made when the program is lowered, for the platform that it is
    lowered for. (`jax.default_backend()` is "cpu" while a program is compiled for a TPU.)

    Args:
      op: a name of `OPS`.
      direction: the function, "forward", "backward", ...
      implementation: see the module.
      *args, **static: of the function.

    Raises:
      ValueError: the implementation does not exist.
      NotImplementedError: a named implementation cannot run here or refuses these arguments. In a program for
        another platform this is raised when the program is lowered.
    """
    name = by_op(implementation)[op]
    default = functools.partial(_definition(op, direction), **static)
    if name == "xla":
        return default(*args)
    if name is not None:
        why_not = _why_not(op, direction, name, args, static)
        if why_not:
            raise NotImplementedError(f"implementation={implementation!r} cannot run: {why_not}")
        return _kernel(op, direction, name, static)(*require_platform(op, name, args))

    decision = Decision(op, direction, {})
    branches: dict[str, Callable] = {}
    taken = []
    for platform, names in KERNELS.items():
        for name in names:
            why_not = _why_not(op, direction, name, args, static) or _missing_compiler(name)
            decision.why_not[name] = why_not
            if why_not is None and _LOWERING[platform] not in branches:
                branches[_LOWERING[platform]] = _kernel(op, direction, name, static)
                taken.append((platform, name))
            elif why_not and _unavailable(op, direction, name) is None:
                _say_why_once(op, direction, name, why_not)
    _say_once(op, direction, tuple(taken))
    recorded = _decisions.get()
    if recorded is not None:
        recorded.append(decision)
    if not branches:
        return default(*args)
    return jax.lax.platform_dependent(*args, default=default, **branches)
