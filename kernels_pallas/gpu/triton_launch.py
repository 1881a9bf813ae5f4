"""Launches Triton kernels from JAX through jax_triton, and on the CPU in Triton's interpreter."""

import contextlib
import dataclasses
import functools
import math
import threading
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.gpu import ahead, device, kernel_cache
from kernels_pallas.gpu.device import INTERPRET
from kernels_pallas.gpu.launch import TARGET, Launch


@dataclasses.dataclass(frozen=True)
class TritonLaunch(Launch):
    """A `Launch` of a `triton.jit` function; `constants` are its `tl.constexpr` arguments.

    Attributes:
      num_stages: depth of software pipelining of loops over `tl.dot`.
    """

    num_stages: int = 2

    def _call(self, args: list) -> tuple[jax.Array, ...]:
        import jax_triton  # fails where jax has no CUDA, hence only here

        self._compile_ahead(args)
        return tuple(
            jax_triton.triton_call(
                *args,
                kernel=self.kernel,
                out_shape=self.outputs,
                grid=self.grid,
                num_warps=self.num_warps,
                num_stages=self.num_stages,
                compute_capability=device.capability(),
                custom_call_target_name=TARGET,
                **self.constants,
            )
        )

    def _compile_ahead(self, args: list) -> None:
        """Begins to fill jax_triton's cache of kernels with what lowering this launch asks it for."""
        from jax_triton import triton_lib

        keeping = _lower_to_ffi()
        scalars = [
            (i, triton_lib.get_triton_type(a), a) for i, a in enumerate(args) if isinstance(a, int)
        ]
        arrays = [
            a if isinstance(a, int) else jax.core.ShapedArray(a.shape, a.dtype)
            for a in [*args, *self.outputs]
        ]
        operands = list(map(triton_lib.get_triton_type, arrays)), scalars
        # Those of `_call`, and jax_triton's defaults.
        options = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "num_ctas": 1,
            "compute_capability": device.capability(),
            "enable_fp_fusion": True,
            "metaparams": dict(sorted(self.constants.items())),
            "dump": False,
        }

        def make():
            with keeping():
                triton_lib.get_or_create_triton_kernel(
                    triton_lib.get_cuda_backend, "cuda", self.kernel, *operands, **options
                )

        ahead.begin(self.kernel, repr((operands, options)), make)

    def _run_numpy(self, args: list) -> tuple[np.ndarray, ...]:
        args = [a if isinstance(a, int) else _to_torch(a) for a in args]
        return self.run_torch(*args, convert=_from_torch)

    def run_torch(self, *args, convert=lambda tensor, dtype: tensor) -> tuple:
        """Runs the kernel on torch tensors (of a GPU, or of the CPU when interpreting)."""
        import torch

        place = next(a.device for a in args if not isinstance(a, int))
        # Filled with NaN: an element that the kernel forgets is then seen.
        outputs = [
            torch.full(o.shape, math.nan, dtype=_torch_dtype(o.dtype), device=place)
            if INTERPRET
            else torch.empty(o.shape, dtype=_torch_dtype(o.dtype), device=place)
            for o in self.outputs
        ]
        options = {} if INTERPRET else {"num_warps": self.num_warps, "num_stages": self.num_stages}
        self.kernel[self.grid](*args, *outputs, **self.constants, **options)
        return tuple(convert(tensor, o.dtype) for tensor, o in zip(outputs, self.outputs))


@functools.cache
def _lower_to_ffi() -> Callable:
    """Makes jax_triton write calls of `TARGET` as XLA reads them; its other calls stay as they are.

    jax_triton 0.3 takes the name of a target, but writes every call in the form of the older one.

    Returns:
      the context of `_keep_ptx`.
    """
    from jax.interpreters import mlir
    from jax.interpreters.mlir import ir
    from jax_triton import triton_lib

    keeping = _keep_ptx(triton_lib)

    def lower(ctx, *args, **parameters):
        ours = parameters["custom_call_target_name"] == TARGET
        if ours:
            ahead.wait(parameters["fn"])
        with keeping() if ours else contextlib.nullcontext():
            results = triton_lib.triton_kernel_call_lowering(
                triton_lib.get_cuda_backend, ctx, *args, **parameters
            )
        call = results[0].owner
        if ir.StringAttr(call.attributes["call_target_name"]).value == TARGET:
            config = call.attributes["backend_config"]
            call.attributes["backend_config"] = ir.DictAttr.get({"opaque": config})
            version = ir.IntegerType.get_signless(32)
            call.attributes["api_version"] = ir.IntegerAttr.get(version, 4)
        return results

    mlir.register_lowering(triton_lib.triton_kernel_call_p, lower, platform="cuda")
    return keeping


def _keep_ptx(triton_lib) -> Callable:
    """Puts `kernel_cache` in front of the two calls by which jax_triton compiles.

    Returns:
      a context inside of which this thread uses it. Outside, and in other threads, nothing changes.
    """
    import jax_triton
    import triton

    first, second = triton_lib.code_gen.ast_to_ttir, triton_lib.compile_ttir_inplace
    versions = triton.__version__, jax_triton.__version__
    fields = "binary", "name", "shared_mem_bytes"
    here = threading.local()

    def to_ttir(fn, source, *, options, **others):
        with ahead.front_end:
            return parsed(fn, source, options=options, **others)

    def parsed(fn, source, *, options, **others):
        if not getattr(here, "active", False) or triton_lib._JAX_TRITON_DUMP_DIR:
            return first(fn, source, options=options, **others)
        here.key = ("triton", versions, fn.__name__, source.hash(), options.hash())
        found = kernel_cache.read(here.key)
        module = first(fn, source, options=options, **others) if found is None else _Kept(found)
        here.ttir = str(module)
        return module

    def to_ptx(module, *args):
        if isinstance(module, _Kept):
            kept = {name: module.entry[name] for name in fields}
            return triton_lib.CompilationResult(**kept, ttgir=None, llir=None)
        key, here.key = getattr(here, "key", None), None
        result = second(module, *args)
        if key is not None:
            entry = {name: getattr(result, name) for name in fields}
            kernel_cache.write(key, {**entry, "ttir": here.ttir})
        return result

    triton_lib.code_gen = types.SimpleNamespace(ast_to_ttir=to_ttir)
    triton_lib.compile_ttir_inplace = to_ptx

    @contextlib.contextmanager
    def keeping():
        here.active = True
        try:
            yield
        finally:
            here.active, here.key = False, None

    return keeping


@dataclasses.dataclass
class _Kept:
    """Stands for the module of a kernel whose PTX was found."""

    entry: dict

    def __str__(self):
        return self.entry["ttir"]


def _torch_dtype(dtype):
    import torch

    return torch.bfloat16 if dtype == jnp.bfloat16 else getattr(torch, np.dtype(dtype).name)


def _to_torch(x: np.ndarray):
    import torch

    if x.dtype == jnp.bfloat16:
        return torch.from_numpy(x.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(x.copy())


def _from_torch(tensor, dtype) -> np.ndarray:
    import torch

    if dtype == jnp.bfloat16:
        return tensor.view(torch.uint16).numpy().view(jnp.bfloat16)
    return tensor.numpy()
