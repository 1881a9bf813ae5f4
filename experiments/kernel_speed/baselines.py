"""Times the same sublayer in PyTorch: Liger-Kernel, TransformerEngine, torch.compile of a plain version.

python -m experiments.kernel_speed.baselines Liger-Kernel 16384 2560    # prints seconds
"""

import functools
import statistics
import sys
from collections.abc import Callable

N, ITERATIONS = 4, 20
M = N * N + 2 * N


def _milliseconds(f: Callable) -> float:
    import torch

    for _ in range(3):
        f()
    times = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(5):
            f()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 5)
    return statistics.median(times)


def _parameters(T: int, C: int) -> tuple:
    import torch

    torch.manual_seed(0)

    def random(*shape, dtype=torch.float32):
        return torch.randn(*shape, device="cuda", dtype=dtype).requires_grad_()

    x = random(T, N, C, dtype=torch.bfloat16)
    g = torch.randn_like(x)
    return x, g, random(N * C, M), random(M), random(3)


def liger(T: int, C: int) -> float:
    """Returns the seconds of Liger-Kernel's sublayer, forward and backward."""
    import torch
    from liger_kernel.transformers import functional

    x, g, phi, bias, alpha = _parameters(T, C)
    phi = phi.detach().to(torch.bfloat16).requires_grad_()

    def step():
        h_pre, h_post, h_res = functional.liger_mhc_coeffs(x, phi, bias, *alpha, tmax=ITERATIONS)
        u = functional.liger_mhc_pre(x, h_pre)
        out = functional.liger_mhc_post_res(x, u, h_post, h_res)
        torch.autograd.grad(out, (x, phi, bias, alpha), g)

    return _milliseconds(step) / 1e3


def transformer_engine(T: int, C: int) -> float:
    """Returns the seconds of TransformerEngine's sublayer, forward and backward: the fastest of its ways.

    It may add up the projection by atomic additions, and the gradient of the streams in one float32 buffer.
    """
    import torch

    from experiments.kernel_speed import transformer_engine as engine

    x, g, *parameters = _parameters(T, C)
    x, g = (a.transpose(1, 2).contiguous()[:, None] for a in (x.detach(), g))
    x.requires_grad_()
    parameters = [a.detach().requires_grad_() for a in engine.from_ours(*parameters)]
    buffer = torch.zeros(x.shape, device="cuda")
    torch.set_float32_matmul_precision("high")

    def step(**options):
        for given in options.values():
            if given is buffer:
                buffer.zero_()
        out, *_ = engine.sublayer(x, *parameters, **options)
        torch.autograd.grad(out, (x, *parameters), g)

    ways = [{}, {"use_split_k": True}, {"use_split_k": True, "fused_grad_x_acc_buffer": buffer}]
    return min(_milliseconds(functools.partial(step, **way)) for way in ways) / 1e3


def torch_compile(T: int, C: int) -> float:
    """Returns the seconds of torch.compile's sublayer, forward and backward."""
    import torch

    x, g, phi, bias, alpha = _parameters(T, C)

    @torch.compile
    def sublayer(x, phi, bias, alpha):
        flat = x.flatten(1).float()
        r = flat.square().mean(-1, keepdim=True).sqrt()
        columns = torch.repeat_interleave(
            alpha, torch.tensor([N, N, N * N], device=x.device), output_size=M
        )
        h = flat @ phi / r * columns + bias
        h_pre, h_post = h[:, :N].sigmoid(), 2 * h[:, N : 2 * N].sigmoid()
        m = torch.exp(h[:, 2 * N :].view(-1, N, N))
        for _ in range(ITERATIONS):
            m = m / m.sum(1, keepdim=True)
            m = m / m.sum(2, keepdim=True)
        x = x.float()
        u = (h_pre[:, :, None] * x).sum(1).bfloat16()
        out = (m[:, :, :, None] * x[:, None]).sum(2) + h_post[:, :, None] * u[:, None].float()
        return out.bfloat16()

    torch.set_float32_matmul_precision("high")

    def step():
        torch.autograd.grad(sublayer(x, phi, bias, alpha), (x, phi, bias, alpha), g)

    return _milliseconds(step) / 1e3


BASELINES = {
    "Liger-Kernel": liger,
    "TransformerEngine": transformer_engine,
    "torch.compile": torch_compile,
}

if __name__ == "__main__":
    print(BASELINES[sys.argv[1]](int(sys.argv[2]), int(sys.argv[3])))
