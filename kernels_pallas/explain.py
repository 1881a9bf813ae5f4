"""Says which implementation `implementation=None` takes for an operation, and why not the others."""

import dataclasses
import numbers
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch
from kernels_pallas.boundary import boundary, read
from kernels_pallas.coefficients import coefficients
from kernels_pallas.hc import hc_boundary, hc_read
from kernels_pallas.logits import boundary_logits, read_logits
from kernels_pallas.look_ahead import look_ahead
from kernels_pallas.mappings import mappings
from kernels_pallas.post_res import post_res
from kernels_pallas.pre import pre
from kernels_pallas.projection import projection
from kernels_pallas.shapes import check_size, num_columns
from kernels_pallas.sinkhorn import sinkhorn

PLATFORMS = ("cpu", "gpu", "tpu")
_NEEDS = {name: platform for platform, names in dispatch.KERNELS.items() for name in names}


@dataclasses.dataclass(frozen=True)
class Choice:
    """One function of an operation.

    Attributes:
      op: the operation; `mappings` is made of two.
      direction: "forward", "backward"; with the norm of the layer input in `pre` "forward_normed", ...
      implementation: what None takes.
      why_not: why each of the others is not taken.
    """

    op: str
    direction: str
    implementation: str
    why_not: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` found; `str` of it is a text to read.

    Attributes:
      question: what was asked.
      choices: one for each function of the operation.
      note: where a package is missing, what would run with it; else "".
    """

    question: str
    choices: tuple[Choice, ...]
    note: str = ""

    def __str__(self) -> str:
        lines = [self.question]
        for choice in self.choices:
            lines.append(f"  {choice.op}, {choice.direction}: {choice.implementation}")
            lines += [f"    not {name}: {why}" for name, why in choice.why_not.items()]
        lines += [f"  {self.note}"] * bool(self.note)
        return "\n".join(lines)


def explain(
    op: str | Callable,
    *,
    n: int = 4,
    C: int = 2560,
    T: int = 4096,
    dtype=jnp.bfloat16,
    num_iterations: int = 20,
    num_logits: int | None = None,
    norm: bool = False,
    platform: str | None = None,
) -> Explanation:
    """Says which implementation an operation runs with `implementation=None`, and why not the others.

    The operation is traced on abstract arrays of these sizes, forward and backward; nothing is computed.

        print(kernels_pallas.explain("boundary", n=4, C=2560))

    Args:
      op: name of an operation of this package, or the function.
      n: number of streams.
      C: width of one stream.
      T: number of tokens.
      dtype: of the streams.
      num_iterations: t_max of Eq. 9.
      num_logits: columns k of `read_logits` and `boundary_logits`; None: n*n.
      norm: whether the layer input is normed (`pre` and what contains it).
      platform: "cpu", "gpu" or "tpu"; None: that of this process's devices.

    Raises:
      ValueError, TypeError: the operation, the platform or the dtype does not exist, or sizes do not fit.
    """
    op = getattr(op, "__name__", op)
    functions = {
        f.__name__: f
        for f in (
            *(projection, coefficients, mappings, sinkhorn, pre, post_res),
            *(read, boundary, read_logits, boundary_logits, look_ahead, hc_read, hc_boundary),
        )
    }
    if op not in functions:
        raise ValueError(f"op={op!r} is no operation: use one of {', '.join(functions)}")
    device = jax.devices()[0]
    platform = platform or device.platform
    if platform not in PLATFORMS:
        raise ValueError(f"platform={platform!r} is unknown: use one of {', '.join(PLATFORMS)}")
    check_size(C, n)
    if not isinstance(T, numbers.Integral) or T < 1:
        raise ValueError(f"T={T!r}: the number of tokens must be an integer of at least 1")
    dtype = jnp.dtype(dtype)
    args, options = _arguments(op, n, C, T, dtype, num_iterations, num_logits, norm)

    def both(*args):
        outputs, vjp = jax.vjp(lambda *a: functions[op](*a, **options), *args)
        return vjp(outputs)

    with dispatch.recording() as decisions:
        jax.eval_shape(both, *args)
    where = f"{platform.upper()}s"
    if platform == device.platform:
        where += f" ({device.device_kind})"
    question = f"{op} with n={n}, C={C}, T={T}, {dtype} streams on {where}"
    choices = tuple(_choice(decision, platform) for decision in decisions)
    return Explanation(question, choices, _note(decisions, platform))


def _note(decisions: list[dispatch.Decision], platform: str) -> str:
    """Says what would run with a package that is missing: its kernels cannot be asked for their sizes."""
    missing = dispatch.missing_for(platform)
    ours = dispatch.KERNELS.get(platform, ())
    names = [n for n in ours if any(n in dispatch.implementations(d.op) for d in decisions)]
    if missing is None or not names:
        return ""
    which = (
        names[0] if len(names) == 1 else f"the first of {', '.join(names)} that takes these sizes"
    )
    return f"{missing}. With it {which} would run, else xla; ask again then."


def _arguments(op, n, C, T, dtype, num_iterations, num_logits, norm):
    """Returns abstract arrays and keywords of an operation."""
    m, K = num_columns(n), n * C
    if op.endswith("_logits") and num_logits is not None:
        m = 2 * n + num_logits

    def floats(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    streams = jax.ShapeDtypeStruct((T, K), dtype)
    update = (streams, jax.ShapeDtypeStruct((T, C), dtype), floats(T, n), floats(T, n, n))
    parameters = (floats(K, m), floats(m), floats(3))
    args = {
        "projection": (streams, parameters[0]),
        "coefficients": (floats(T, m), floats(T), *parameters[1:]),
        "mappings": (streams, *parameters),
        "sinkhorn": (floats(T, n, n),),
        "pre": (streams, floats(T, n)),
        "post_res": update,
        "read": (streams, *parameters),
        "boundary": (*update, *parameters),
        "read_logits": (streams, *parameters),
        "boundary_logits": (*update, *parameters),
        "look_ahead": (*update, floats(T, n), *parameters),
        "hc_read": (streams, floats(2 + n, C), *parameters[1:]),
        "hc_boundary": (*update, floats(2 + n, C), *parameters[1:]),
    }[op]
    options = {}
    fused = ("read", "boundary", "read_logits", "boundary_logits", "look_ahead")
    fused += ("hc_read", "hc_boundary")
    if op in ("coefficients", "mappings", *fused):
        options |= {"n": n}
    if op in ("coefficients", "mappings", "sinkhorn", "read", "boundary", "look_ahead"):
        options |= {"num_iterations": num_iterations}
    if norm and op in fused:
        options |= {"input_norm_eps": 1e-6}
    if norm and op == "pre":
        options |= {"norm_eps": 1e-6}
    return args, options


def _choice(decision: dispatch.Decision, platform: str) -> Choice:
    candidates = dispatch.KERNELS.get(platform, ())
    taken = next((name for name in candidates if decision.why_not[name] is None), "xla")
    why_not = {}
    for name in dispatch.IMPLEMENTATIONS:
        if name == taken:
            continue
        reason = decision.why_not.get(name)
        has_one = name in dispatch.implementations(decision.op)
        if has_one and _NEEDS.get(name, platform) != platform:
            reason = f"needs a {_NEEDS[name].upper()}"
        why_not[name] = reason or f"could run; {taken} is taken as the faster one"
    return Choice(decision.op, decision.direction, taken, why_not)
