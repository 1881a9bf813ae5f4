"""Raises an error if a program with a named kernel is lowered for a platform that cannot run it.

The platform is known when a program is lowered, not when it is traced: a host without a TPU may compile for
one. The errors of Pallas, Triton and XLA name neither the implementation nor the way out.
"""

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

_NEEDS = {"pallas": "tpu", "triton": "cuda", "cuda": "cuda"}
_NAMES = {"cuda": "an NVIDIA GPU", "rocm": "an AMD GPU", "tpu": "a TPU", "cpu": "a CPU"}

_require_p = Primitive("require_platform")


def require_platform(op: str, implementation: str, args: tuple) -> tuple:
    """Returns `args` as they are, and lets the program be lowered for the implementation's platform alone.

    Raises:
      NotImplementedError: when the program is lowered for another platform, unless kernels are interpreted.
    """
    (first, *rest), tree = jax.tree.flatten(args)
    if not first.size or _interpreted(implementation):  # no tokens, no kernel
        return args
    first = _require_p.bind(first, op=op, implementation=implementation)
    return jax.tree.unflatten(tree, (first, *rest))


def _interpreted(implementation: str) -> bool:
    if implementation == "pallas":
        # JAX has no public way to ask what `pltpu.force_tpu_interpret_mode` has set.
        from jax._src import config

        setting = getattr(config, "pallas_tpu_interpret_mode_context_manager", None)
        return setting is None or bool(setting.value)
    # Not at the top: triton may not be installed. Here its kernels have been found.
    from kernels_pallas.gpu.device import INTERPRET

    return INTERPRET


def _lower(ctx, x, *, op, implementation):
    for platform in ctx.module_context.platforms:
        if platform != _NEEDS[implementation]:
            raise NotImplementedError(
                f"{op}: implementation={implementation!r} needs {_NAMES[_NEEDS[implementation]]}, this "
                f"program is for {_NAMES.get(platform, platform)}: use None, the best of the platform, or "
                "'xla'"
            )
    return [x]


def _batch(args, dims, **parameters):
    return _require_p.bind(*args, **parameters), dims[0]


_require_p.def_abstract_eval(lambda x, **_: x)
_require_p.def_impl(lambda x, **parameters: jax.jit(lambda x: _require_p.bind(x, **parameters))(x))
batching.primitive_batchers[_require_p] = _batch
mlir.register_lowering(_require_p, _lower)
