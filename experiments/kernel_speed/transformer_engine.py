"""The mHC kernels of NVIDIA's TransformerEngine, from its Python files alone.

    pip install --no-deps --target FOLDER transformer_engine==2.20.2     (1 MB of Python, no CUDA)
    PYTHONPATH=FOLDER python -m experiments.kernel_speed.baselines TransformerEngine 16384 2560

Its packages load a compiled library of CUDA when they are imported. The Triton files of mHC need of it one
matrix product, for the gradient of phi, in whose place torch's stands here: cuBLAS in both cases.
"""

import importlib
import importlib.util
import pathlib
import sys
import types
from typing import Any

N = 4
_PACKAGES = ("", ".common", ".common.triton", ".pytorch", ".pytorch.triton")


def load() -> Any:
    """Imports `transformer_engine.pytorch.triton.mhc` without the packages around it.

    Raises:
      ModuleNotFoundError: there is no TransformerEngine, or one without mHC.
    """
    import torch

    name = "transformer_engine"
    if f"{name}.pytorch.triton.mhc" not in sys.modules:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(f"{name} is not installed: see {__name__}")
        (folder,) = spec.submodule_search_locations
        for package in _PACKAGES:
            module = types.ModuleType(name + package)
            module.__path__ = [str(pathlib.Path(folder, *package.split(".")[1:]))]
            sys.modules[module.__name__] = module

        def general_gemm(a, b, *, out_dtype, layout):
            assert layout == "NT"
            return (b.T.to(out_dtype) @ a.to(out_dtype),)

        product = types.ModuleType(f"{name}.pytorch.cpp_extensions.gemm")
        product.general_gemm = general_gemm  # type: ignore[attr-defined]
        sys.modules[f"{name}.pytorch.cpp_extensions"] = types.ModuleType("cpp_extensions")
        sys.modules[product.__name__] = product
    module = importlib.import_module(f"{name}.pytorch.triton.mhc")
    if not torch.cuda.is_available():  # Triton's interpreter: nothing to choose by time
        module._support_tma = lambda x: False
        for kernel in vars(module).values():
            if hasattr(kernel, "configs"):
                kernel.do_bench = lambda run, quantiles: [0.0 for _ in quantiles]
    return module


def from_ours(phi, bias, alpha) -> tuple:
    """Our parameters [4C, 24], [24], [3] as theirs: [24, 4C] with streams innermost, [1, 24], [3].

    Their H_res is the transpose of h_res.
    """
    import torch

    order = torch.arange(2 * N + N * N)
    order[2 * N :] = order[2 * N :].view(N, N).T.flatten()
    C = phi.shape[0] // N
    phi = phi.view(N, C, -1).transpose(0, 1).reshape(N * C, -1).T[order]
    return phi.contiguous(), bias[order][None].contiguous(), alpha


def sublayer(x, phi, bias, alpha, **options):
    """One sublayer with F(u) = u.

    Args:
      x: streams [S, B, C, 4].
      phi, bias, alpha: of `from_ours`.
      **options: of their `mhc_generate_mix_and_aggregate`.

    Returns:
      new streams [S, B, C, 4]; h_post [S, B, 4], and h_res [S, B, 4, 4] of ours.
    """
    mhc = load()
    u, h_post, h_res = mhc.mhc_generate_mix_and_aggregate(x, phi, alpha, bias, **options)
    buffer = {k: v for k, v in options.items() if k == "fused_grad_x_acc_buffer"}
    out = mhc.mhc_fused_expand_combine(u, None, h_post, x, h_res, N, **buffer)
    return out, h_post, h_res.transpose(-1, -2)
