"""Sinkhorn-Knopp in Triton: tiles [n, tokens, n] (row, token, column), one thread a row of a matrix.

A thread holds a row (or 4 entries of it). So row sums stay in the thread, column sums are two or three
shuffles, and one iterate costs a thread 4 registers. Triton gives lanes to the columns of a tile first, then
to its first axis and at last, with the warps, to the axis between: so no matrix is spread over warps. The
backward keeps all iterates in registers (76 for the paper's 20 iterations) and writes nothing to memory.
"""

import jax
import triton
import triton.language as tl

from kernels_pallas.gpu import device
from kernels_pallas.gpu.launch import struct
from kernels_pallas.gpu.triton_launch import TritonLaunch
from kernels_pallas.gpu.triton_math import exp, opaque, reciprocal

# 40 iterates keep 160 of a thread's 255 registers.
MAX_BACKWARD_ITERATIONS = 40

_PAD = tl.constexpr(-3.0e38)  # a logit that no |logit| <= 1e30 comes near


@triton.jit
def first_iteration(logits, valid, EPS: tl.constexpr):
    """Returns the softmax over rows of the log-softmax over columns, and the softmax over columns.

    `valid` marks the entries of matrices whose n is no power of two (None: all); the rest stay zero. With
    EPS, a lower bound of every entry, no logarithm is needed.
    """
    if valid is not None:
        logits = tl.where(valid, logits, _PAD)
    centred = logits - tl.max(logits, axis=0, keep_dims=True)
    exps = exp(centred)
    total = tl.sum(exps, axis=0, keep_dims=True)
    softmax = exps / total
    if EPS > 0:
        m = softmax + EPS
    else:
        logs = centred - tl.log(total)
        if valid is not None:
            logs = tl.where(valid, logs, _PAD)
        m = exp(logs - tl.max(logs, axis=2, keep_dims=True))
    if valid is not None:
        m = tl.where(valid, m, 0.0)
    return normalise(m, valid, 2, EPS), softmax


@triton.jit
def normalise(m, valid, AXIS: tl.constexpr, EPS: tl.constexpr):
    """Divides m by its sums + EPS along AXIS (0: columns, 2: rows); sums of padding alone count as one."""
    return m * inverse_sums(m, valid, AXIS, EPS)


@triton.jit
def inverse_sums(m, valid, AXIS: tl.constexpr, EPS: tl.constexpr):
    """Returns 1 / (sums of m + EPS) along AXIS, as an axis of length 1.

    Without EPS a sum is at least 1 / n^2: rows (columns) that have just been divided by their sums have an
    entry of 1 / n or more, and the sum that it is divided by next is n or less.
    """
    total = tl.sum(m, axis=AXIS, keep_dims=True)
    if EPS > 0:  # padding gets it too, so that 0 + EPS marks it below
        total += EPS
    if valid is not None:
        total = tl.where(total == EPS, 1.0, total)
    return reciprocal(total)


@triton.jit
def project(logits, valid, NUM_ITERATIONS: tl.constexpr, EPS: tl.constexpr):
    """Computes h_res of the logits [n, tokens, n]."""
    m, _ = first_iteration(logits, valid, EPS)
    for _ in range(1, NUM_ITERATIONS):
        m = normalise(normalise(m, valid, 0, EPS), valid, 2, EPS)
    return m


@triton.jit
def project_backward(logits, d, valid, NUM_ITERATIONS: tl.constexpr, EPS: tl.constexpr):
    """Returns the cotangent of the logits, given that of h_res; the iterates live in registers."""
    first, softmax = first_iteration(logits, valid, EPS)
    iterates = (first,)
    for t in tl.static_range(1, NUM_ITERATIONS):
        m = normalise(normalise(iterates[t - 1], valid, 0, EPS), valid, 2, EPS)
        iterates = iterates + (m,)
    for t in tl.static_range(1, NUM_ITERATIONS):
        # Opaque, or the compiler keeps all sums of the forward too: 255 registers and spills.
        before = opaque(iterates[NUM_ITERATIONS - 1 - t])
        after_rows = iterates[NUM_ITERATIONS - t]
        inverse_columns = inverse_sums(before, valid, 0, EPS)
        after_columns = before * inverse_columns
        inverse_rows = inverse_sums(after_columns, valid, 2, EPS)
        d = (d - tl.sum(d * after_rows, axis=2, keep_dims=True)) * inverse_rows
        d = (d - tl.sum(d * after_columns, axis=0, keep_dims=True)) * inverse_columns
    d = d - tl.sum(d * first, axis=2, keep_dims=True)
    if EPS > 0:
        m = softmax + EPS
        if valid is not None:
            m = tl.where(valid, m, 0.0)
        d_log = softmax * (d * inverse_sums(m, valid, 2, EPS))
    else:
        d_log = first * d
    return d_log - softmax * tl.sum(d_log, axis=0, keep_dims=True)


@triton.jit
def _tile(T, N: tl.constexpr, P: tl.constexpr, TOKENS: tl.constexpr):
    """Returns offsets and mask of a tile [P, TOKENS, P] of matrices [T, N, N], and the valid entries."""
    t = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS))[None, :, None]
    i = tl.arange(0, P)[:, None, None]
    j = tl.arange(0, P)[None, None, :]
    offsets = t.to(tl.int64) * (N * N) + i * N + j
    valid = tl.broadcast_to((i < N) & (j < N), (P, TOKENS, P))
    return offsets, valid & (t < T), valid


@triton.jit
def mhc_sinkhorn_forward(
    logits_ptr,
    T,
    out_ptr,
    N: tl.constexpr,
    P: tl.constexpr,
    TOKENS: tl.constexpr,
    NUM_ITERATIONS: tl.constexpr,
    EPS: tl.constexpr,
):
    """Computes h_res of TOKENS matrices."""
    offsets, mask, valid = _tile(T, N, P, TOKENS)
    logits = tl.load(logits_ptr + offsets, mask=mask, other=0.0)
    if N == P:
        out = project(logits, None, NUM_ITERATIONS, EPS)
    else:
        out = project(logits, valid, NUM_ITERATIONS, EPS)
    tl.store(out_ptr + offsets, out, mask=mask)


@triton.jit
def mhc_sinkhorn_backward(
    logits_ptr,
    d_ptr,
    T,
    out_ptr,
    N: tl.constexpr,
    P: tl.constexpr,
    TOKENS: tl.constexpr,
    NUM_ITERATIONS: tl.constexpr,
    EPS: tl.constexpr,
):
    """Returns the cotangent of the logits of TOKENS matrices."""
    offsets, mask, valid = _tile(T, N, P, TOKENS)
    logits = tl.load(logits_ptr + offsets, mask=mask, other=0.0)
    d = tl.load(d_ptr + offsets, mask=mask, other=0.0)
    if N == P:
        out = project_backward(logits, d, None, NUM_ITERATIONS, EPS)
    else:
        out = project_backward(logits, d, valid, NUM_ITERATIONS, EPS)
    tl.store(out_ptr + offsets, out, mask=mask)


def tokens_per_program(n: int) -> int:
    """Returns the tokens of a program of one warp, so that a thread holds 4 entries (2 at n = 2)."""
    padded = device.next_power_of_2(n)
    return max(1, 32 * min(4, padded) // (padded * padded))


def launch(kernel, T: int, n: int, num_iterations: int, eps: float = 0.0) -> TritonLaunch:
    """Makes the launch of either kernel for logits [T, n, n]."""
    tokens = tokens_per_program(n)
    return TritonLaunch(
        kernel=kernel,
        grid=(device.cdiv(T, tokens),),
        outputs=(struct((T, n, n)),),
        constants={
            "N": n,
            "P": device.next_power_of_2(n),
            "TOKENS": tokens,
            "NUM_ITERATIONS": num_iterations,
            "EPS": eps,
        },
        num_warps=1,
    )


def check_iterations(num_iterations: int) -> None:
    """Raises NotImplementedError for more iterates than a thread's registers hold."""
    if num_iterations > MAX_BACKWARD_ITERATIONS:
        raise NotImplementedError(
            f"num_iterations={num_iterations}: the Triton backward keeps the iterates in registers"
            f" and takes at most {MAX_BACKWARD_ITERATIONS}"
        )


def check(logits: jax.Array, *_, num_iterations: int, **__) -> None:
    """Raises NotImplementedError for n outside 2 ... 8, float64 or too many iterations."""
    n = logits.shape[-1]
    if not 2 <= n <= 8:
        raise NotImplementedError(f"n={n}: the Triton Sinkhorn takes n = 2 ... 8")
    if logits.dtype != jax.numpy.float32:
        raise NotImplementedError(f"{logits.dtype} logits: the Triton Sinkhorn takes float32")
    check_iterations(num_iterations)


def _run(kernel, logits, *rest, num_iterations, eps=0.0):
    *lead, n, _ = logits.shape
    T = device.num_tokens(lead)
    if not T:
        return logits
    (out,) = launch(kernel, T, n, num_iterations, eps)(logits, *rest, T)
    return out.reshape(logits.shape)


def forward(logits: jax.Array, **static) -> jax.Array:
    """Maps [..., n, n] logits -> [..., n, n]."""
    return _run(mhc_sinkhorn_forward, logits, **static)


def backward(logits: jax.Array, d_h_res: jax.Array, **static) -> jax.Array:
    """Returns the cotangent of the logits; iterates in registers, no scratch memory."""
    return _run(mhc_sinkhorn_backward, logits, d_h_res, **static)
