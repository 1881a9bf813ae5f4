"""Device functions shared by the Triton kernels."""

import triton
import triton.language as tl

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc):
    """Computes acc + a @ b in float32. Products of bfloat16 are exact; float32 uses no tensor cores."""
    if INTERPRET:  # the interpreter keeps bfloat16 as integers and cannot multiply them
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def exp(x):
    """Computes exp(x) to about 1e-7 for x in [-110, 88], and clamps x to that range.

    Below it the result is 0 anyway; above it, callers use it as 1 / (1 + exp). Triton's own exp is 2^(x log2
    e) with a rounded product: 2e-6 at x = 30, eight times the error of "xla".
    """
    x = tl.minimum(tl.maximum(x, -110.0), 88.0)
    k = tl.floor(x * 1.4426950408889634 + 0.5)
    # ln 2 in two parts. k times the first part is exact.
    return tl.exp((x - k * 0.693145751953125) - k * 1.42860677e-6) * tl.exp2(k)


@triton.jit
def dot_tf32(a, b):
    """Computes a @ b for float32 operands that are TF32 numbers: exact products, float32 sums."""
    return tl.dot(a, b, input_precision="tf32")


@triton.jit
def cast(x, dtype: tl.constexpr):
    """Rounds float32 to `dtype`, to nearest even."""
    if INTERPRET and dtype == tl.bfloat16 and x.dtype == tl.float32:  # the interpreter truncates
        bits = x.to(tl.int32, bitcast=True)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        x = (bits & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def round_tf32(x):
    """Rounds to the nearest TF32 number (8 exponent, 10 mantissa bits), ties to even; NaN and inf stay."""
    bits = x.to(tl.int32, bitcast=True)
    bits = bits + 0xFFF + ((bits >> 13) & 1)
    rounded = (bits & -8192).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) < float("inf"), rounded, x)


@triton.jit
def opaque(x):
    """Returns x and hides its origin from the compiler, so that equal computations are not merged."""
    if INTERPRET:
        return x
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=False, pack=1
    )


@triton.jit
def reciprocal(x):
    """Returns 1 / x to one unit in the last place, in one instruction; x from 1e-37 to 1e37.

    Triton's division takes six, for what is outside of this range.
    """
    if INTERPRET:
        return 1.0 / x
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def scalars(vector, first, COUNT: tl.constexpr):
    """Returns COUNT entries of a vector from `first` on as a tuple of scalars."""
    entry = tl.arange(0, vector.shape[0])
    found = ()
    for i in tl.static_range(COUNT):
        found = found + (tl.sum(tl.where(entry == first + i, vector, 0.0), axis=0),)
    return found


@triton.jit
def vector(values, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """Returns COUNT scalars of a tuple as a vector of SIZE, a power of two; the rest are zeros."""
    entry = tl.arange(0, SIZE)
    found = tl.zeros((SIZE,), tl.float32)
    for i in tl.static_range(COUNT):
        found = tl.where(entry == i, values[i], found)
    return found


@triton.jit
def columns(start, ROWS: tl.constexpr, VEC: tl.constexpr):
    """Returns offsets start + [ROWS, VEC]: a thread holds the VEC neighbours of one row, 16 bytes.

    A sum over the last axis then stays inside the thread. So a long sum takes one register a thread instead
    of VEC, and its loop has no shuffle.
    """
    return start + tl.arange(0, ROWS)[:, None] * VEC + tl.arange(0, VEC)[None, :]


@triton.jit
def load(ptr, offsets, LIMIT: tl.constexpr, EVEN: tl.constexpr):
    """Loads float32, with zeros from column LIMIT on; EVEN says that there are no such columns."""
    if EVEN:
        return tl.load(ptr + offsets).to(tl.float32)
    return tl.load(ptr + offsets, mask=offsets < LIMIT, other=0.0).to(tl.float32)


@triton.jit
def load_once(ptr, offsets, LIMIT: tl.constexpr, EVEN: tl.constexpr):
    """Does `load` of what is read once in a while: L2 gives it up before all else."""
    if EVEN:
        return tl.load(ptr + offsets, eviction_policy="evict_first").to(tl.float32)
    x = tl.load(ptr + offsets, mask=offsets < LIMIT, other=0.0, eviction_policy="evict_first")
    return x.to(tl.float32)


@triton.jit
def store(ptr, offsets, value, LIMIT: tl.constexpr, EVEN: tl.constexpr):
    """Stores in the pointer's dtype, skipping columns from LIMIT on."""
    value = cast(value, ptr.dtype.element_ty)
    if EVEN:
        tl.store(ptr + offsets, value)
    else:
        tl.store(ptr + offsets, value, mask=offsets < LIMIT)


@triton.jit
def load_tile(ptrs, mask, EVEN: tl.constexpr):
    """Loads a tile in the pointers' dtype; EVEN says that the mask is true everywhere."""
    if EVEN:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def store_tile(ptrs, value, mask, EVEN: tl.constexpr):
    """Stores a tile, rounded to the pointers' dtype."""
    value = cast(value, ptrs.dtype.element_ty)
    if EVEN:
        tl.store(ptrs, value)
    else:
        tl.store(ptrs, value, mask=mask)
