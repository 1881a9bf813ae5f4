"""The emulator of CUDA kernels: what it computes against numpy, and that it sees mistakes."""

import ml_dtypes
import numpy as np
import pytest

from kernels_pallas.testing import emulate

if not emulate.available():
    pytest.skip("the emulator needs g++", allow_module_level=True)

SEEDS = range(8)
F32, U16, U32, I32 = np.float32, np.uint16, np.uint32, np.int32
BF16 = ml_dtypes.bfloat16

PRIMITIVES = """
#include "warp.cuh"
extern "C" __global__ void __launch_bounds__(32) primitives(
    const float* __restrict__ a, const float* __restrict__ b, float* d, const uint4* rows, uint4* loaded,
    u32* transposed, const bf16* halves, float* widened, const float2* pairs, u32* packed, float* shuffled,
    float* computed, int from, float scale) {
  SHARED_MEMORY(memory);
  const int lane = threadIdx.x, g = lane / 4, q = lane % 4;

  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = d[(g + i / 2 * 8) * 8 + 2 * q + i % 2];
  multiply_tf32(sum, a[g * 8 + q], a[(g + 8) * 8 + q], a[g * 8 + q + 4], a[(g + 8) * 8 + q + 4], b[q * 8 + g],
                b[(q + 4) * 8 + g]);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * q + i % 2] = sum[i];

  uint4* shared = reinterpret_cast<uint4*>(memory);
  shared[lane] = rows[lane];
  __syncwarp();
  u32 word[4];
  load_matrices(word, &shared[lane % 8 + (3 - lane / 8) * 8]);  // matrices 3, 2, 1, 0
  loaded[lane] = {word[0], word[1], word[2], word[3]};
  transposed[lane] = transpose(word[3]);

  const u32 two = halves[2 * lane] | u32(halves[2 * lane + 1]) << 16;
  widened[2 * lane] = low(two);
  widened[2 * lane + 1] = high(two);
  packed[lane] = pack_bf16(pairs[lane].x, pairs[lane].y);

  shuffled[lane] = __shfl_sync(~0u, lane * lane, from);
  // Halves of a warp apart.
  if (lane < 16) shuffled[32 + lane] = __shfl_sync(0xffffu, a[lane], lane ^ 8);
  else shuffled[32 + lane] = __shfl_sync(0xffff0000u, -a[lane], 16);

  computed[lane] = fmaf(a[lane], scale, min(lane, 20));
}
"""


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """`build(text, name, **defines)`: a kernel of the source `text`."""
    folder = tmp_path_factory.mktemp("kernels")

    def build(text: str, name: str, **defines) -> emulate.Kernel:
        source = folder / f"{name}.cu"
        source.write_text(text)
        return emulate.compile(source, name, defines)

    return build


def test_primitives(build):
    rng = np.random.default_rng(0)
    a, b, d = (rng.standard_normal(s).astype(F32) for s in ((16, 8), (8, 8), (16, 8)))
    rows = rng.integers(0, 2**16, (4, 8, 8), U16)
    halves = rng.standard_normal(64).astype(BF16)
    pairs = rng.standard_normal(64).astype(F32)
    # Ties to even, up to the next exponent, to infinity; a denormal; NaNs.
    pairs[:8].view(U32)[:] = (
        *(0x3F808000, 0x3F818000, 0x3FFFFFFF, 0x7F7FFFFF),
        *(0x00000001, 0xFFFFFFFF, 0x7FC00000, 0x80000000),
    )
    product, loaded, transposed = d.copy(), np.zeros((32, 4, 2), U16), np.zeros((8, 8), U16)
    widened, packed = np.zeros(64, F32), np.zeros(64, U16)
    shuffled, computed = np.zeros((2, 32), F32), np.zeros(32, F32)
    arrays = (a, b, product, rows, loaded, transposed, halves, widened, pairs, packed, shuffled)
    build(PRIMITIVES, "primitives")(1, 32, 512, [*arrays, computed, 7, 0.5])

    kept = [(x.view(U32) & 0xFFFFE000).view(F32).astype(np.float64) for x in (a, b)]
    np.testing.assert_allclose(product, d + kept[0] @ kept[1], rtol=1e-6, atol=1e-6)
    assert abs(product - (d + a @ b)).max() > 1e-4
    np.testing.assert_array_equal(loaded, rows[::-1].reshape(4, 32, 2).swapaxes(0, 1))
    np.testing.assert_array_equal(transposed, rows[0].T)
    np.testing.assert_array_equal(widened, halves.astype(F32))
    np.testing.assert_array_equal(packed.view(BF16).astype(F32), pairs.astype(BF16).astype(F32))
    lanes, x = np.arange(32), a.reshape(-1)[:32]
    np.testing.assert_array_equal(shuffled[0], np.full(32, 49))
    np.testing.assert_array_equal(shuffled[1], np.where(lanes < 16, x[lanes ^ 8], -x[16]))
    np.testing.assert_allclose(computed, 0.5 * x + lanes.clip(max=20), rtol=1e-6, atol=1e-6)


PIECES = """
#include "warp.cuh"
extern "C" __global__ void __launch_bounds__(32) pieces(
    const u32* a, const u32* columns, float* d, const uint4* words, uint4* stored, uint4* loaded,
    const float* numbers, float* copied) {
  SHARED_MEMORY(memory);
  const int lane = threadIdx.x, g = lane / 4, q = lane % 4;

  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = d[(g + i / 2 * 8) * 8 + 2 * q + i % 2];
  const u32 left[4] = {a[g * 8 + q], a[(g + 8) * 8 + q], a[g * 8 + q + 4], a[(g + 8) * 8 + q + 4]};
  multiply_bf16(sum, left, columns[g * 8 + q], columns[g * 8 + q + 4]);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * q + i % 2] = sum[i];

  uint4* rows = reinterpret_cast<uint4*>(memory);
  const uint4 own = words[lane];
  store_matrices(rows + (31 - lane), own.x, own.y, own.z, own.w);  // rows in reverse
  __syncwarp();
  stored[lane] = rows[lane];
  u32 word[4];
  load_matrices(word, rows + (31 - lane));
  loaded[lane] = {word[0], word[1], word[2], word[3]};

  float* buffer = reinterpret_cast<float*>(rows + 32);
  copy_async_4(buffer + lane, numbers + 1 + lane, true);
  copy_async_commit();
  copy_async_4(buffer + 63 - lane, numbers + lane, lane != 5);
  copy_async_commit();
  copy_async_wait<1>();
  copied[lane] = buffer[lane];
  copied[32 + lane] = buffer[63 - lane];
  copy_async_wait<0>();
  copied[64 + lane] = buffer[63 - lane];
}
"""


def test_primitives_of_halves_and_short_copies(build):
    rng = np.random.default_rng(2)
    a, b = (rng.standard_normal(s).astype(BF16) for s in ((16, 16), (16, 8)))
    d, numbers = (rng.standard_normal(s).astype(F32) for s in ((16, 8), 33))
    words = rng.integers(0, 2**16, (32, 4, 2), U16)  # of each lane, in halves
    product, stored, loaded = d.copy(), np.zeros((32, 8), U16), np.zeros((32, 4, 2), U16)
    copied = np.zeros((3, 32), F32)
    arrays = (a, b.T.copy(), product, words, stored, loaded, numbers, copied)
    build(PIECES, "pieces")(1, 32, 768, arrays)

    exact = d + a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_allclose(product, exact, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(stored, words.swapaxes(0, 1).reshape(32, 8)[::-1])
    np.testing.assert_array_equal(loaded, words)
    np.testing.assert_array_equal(copied[0], numbers[1:])
    assert np.isnan(copied[1]).all()  # not waited for
    np.testing.assert_array_equal(copied[2], np.where(np.arange(32) == 5, 0, numbers[:32]))

    build(PIECES.replace("__syncwarp();", ""), "pieces")(1, 32, 768, arrays)
    assert (stored == 0xFFC0).all(1).any()  # read before another lane wrote it


PIPELINE = """
#include "warp.cuh"
enum { NONE, NO_WAIT, LATE_WAIT, NO_BARRIER, NO_SECOND_BARRIER, NO_SYNCWARP };
// y = sums over steps of x [steps, 64, 4], threads in reverse, without rows 5 of x.
extern "C" __global__ void pipeline(const float4* x, float4* y, float* seen, int steps, int mistake) {
  SHARED_MEMORY(memory);
  float4* buffer = reinterpret_cast<float4*>(memory);
  const int t = threadIdx.x, threads = blockDim.x;
  float4 sum = make_float4(0, 0, 0, 0);
  for (int step = -1; step < steps; ++step) {
    const int next = step + 1;
    if (next < steps) copy_async_16(buffer + next % 2 * threads + t, x + next * threads + t, t != 5);
    copy_async_commit();
    if (step < 0) continue;
    if (mistake == LATE_WAIT) copy_async_wait<2>();
    else if (mistake != NO_WAIT) copy_async_wait<1>();
    if (mistake != NO_BARRIER) __syncthreads();
    const float4 other = buffer[step % 2 * threads + threads - 1 - t];
    sum = make_float4(sum.x + other.x, sum.y + other.y, sum.z + other.z, sum.w + other.w);
    if (mistake != NO_SECOND_BARRIER) __syncthreads();
  }
  y[t] = sum;

  buffer[t] = sum;
  if (mistake != NO_SYNCWARP) __syncwarp();
  u32 word[4];
  load_matrices(word, buffer + (t ^ 31));
  seen[t] = __uint_as_float(word[0]);
}
"""
MISTAKES = ("none", "no wait", "late wait", "no barrier", "no second barrier", "no syncwarp")


@pytest.mark.parametrize("mistake", range(len(MISTAKES)), ids=MISTAKES)
def test_missing_waits_and_barriers_are_seen(build, mistake):
    kernel = build(PIPELINE, "pipeline")
    x = np.random.default_rng(1).standard_normal((6, 64, 4)).astype(F32)
    x[:, 5] = 0
    right = x.sum(0)[::-1]
    x[:, 5] = 1e9
    results = []
    for seed in SEEDS:
        y, seen = np.full((64, 4), 7, F32), np.zeros(64, F32)
        kernel(1, 64, 2 * 64 * 16, [x, y, seen, 6, mistake], seed=seed)
        results.append(y.tobytes() + seen.tobytes())
        if not mistake:
            np.testing.assert_allclose(y, right, atol=1e-5)
            assert np.isin(seen, y).all()
        elif MISTAKES[mistake] in ("no wait", "late wait"):
            assert np.isnan(y).any()
    assert mistake in (1, 2) or (len(set(results)) == 1) == (not mistake)


BLOCKS = """
#include "warp.cuh"
// Blocks write where they are in the grid, and count themselves with no care for each other.
extern "C" __global__ void blocks(int* places, int* counts) {
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z), t = threadIdx.x;
  places[block * blockDim.x + t] = blockIdx.x + 10 * blockIdx.y + 100 * blockIdx.z + 1000 * t;
  const int before = counts[t];
  __syncthreads();
  counts[t] = before + 1;
}
"""


def test_blocks_run_side_by_side(build):
    kernel = build(BLOCKS, "blocks")
    z, y, x, t = np.indices((2, 2, 3, 64))
    least = []
    for seed in SEEDS:
        places, counts = np.zeros((2, 2, 3, 64), I32), np.zeros(64, I32)
        kernel((3, 2, 2), 64, 0, [places, counts], seed=seed)
        np.testing.assert_array_equal(places, x + 10 * y + 100 * z + 1000 * t)
        least.append(counts.min())
    assert least[0] == 12  # seed 0: one after the other
    assert min(least) < 12


FAULTS = """
#include "warp.cuh"
__device__ __attribute__((noinline)) float large_frame(int t) {
  volatile char large[60000];
  large[t] = 1;
  __syncwarp();
  return large[0];
}
extern "C" __global__ void faults(float* out, int* numbers, int which) {
  SHARED_MEMORY(memory);
  const int t = threadIdx.x;
  float* shared = reinterpret_cast<float*>(memory);
  u32 word[4];
  switch (which) {
    case 0: if (t < 40) __syncwarp(); else __shfl_sync(~0u, 1, 0); break;
    case 1: if (t < 40) __syncwarp(); else __syncthreads(); break;
    case 2: if (t < 40) return; __syncwarp(); break;
    case 3: store_matrices(shared + 4 * t, 0, 0, 0, 0); break;
    case 4: copy_async_4(shared + t, reinterpret_cast<char*>(numbers) + 2, true); break;
    case 5: *reinterpret_cast<float4*>(shared + t) = make_float4(0, 0, 0, 0); break;
    case 6: numbers[0] = *reinterpret_cast<int*>(16 * numbers[0] + 64); break;
    case 7: numbers[0] = t / numbers[0]; break;
    case 8: copy_async_16(shared + 4 * t, out, true); break;
    case 9: load_matrices(word, shared + t); break;
    case 10: shared[128] = 1; break;
    case 11: out[-1] = 1; break;
    case 12: numbers[1] = 1; break;
    case 13: __shfl_sync(1u, 1, 2); break;
    case 14: out[0] = large_frame(t); break;
    case 15: __syncthreads(); if (t == 3) out[0] = 1; break;
  }
}
"""


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (0, "divergence.*warp 1: lanes 0-7 at __syncwarp .*, lanes 8-31 at __shfl_sync"),
        (1, "deadlock.*warp 1: lanes 0-7 at __syncwarp .*, lanes 8-31 at __syncthreads"),
        (2, r"deadlock.*block \(0, 0, 0\) warp 1: lanes 0-7 ended, lanes 8-31 at __syncwarp"),
        (3, r"thread 32 .*: store_matrices \(faults.cu:18\): shared address 512 outside of 512"),
        (4, "thread 0 .*copy_async_4.*the global address is not a multiple of 4"),
        (5, "thread 1 .*misaligned"),
        (6, "memory that is not there, 0x40"),
        (7, "division by zero"),
        (8, "thread 32 .*copy_async_16.*shared address 512 outside of 512"),
        (9, "thread 1 .*load_matrices.*shared address 4 is not a multiple"),
        (10, "wrote outside of 512 bytes"),
        (11, "argument 0: the kernel wrote before the array"),
        (12, "argument 1: the kernel wrote after the array"),
        (13, "mask"),
        (14, "the stack is full"),
        (15, "argument 0: the kernel wrote into a read-only array"),
    ],
)
def test_faults_are_exceptions(build, which, message):
    kernel = build(FAULTS, "faults")
    out, numbers = np.zeros(4, F32), np.zeros(1, I32)
    out.flags.writeable = which != 15
    with pytest.raises(emulate.EmulationError, match=message):
        kernel(1, 64, 512, [out, numbers, which])
    assert not out.any()
    kernel(1, 64, 512, [out, numbers, -1])  # a later launch starts anew


def test_arguments_are_checked(build):
    kernel = build(FAULTS, "faults")
    assert kernel.parameters == ["p8", "p8", "i4"]
    x, out = np.zeros(8, F32), np.zeros(4, F32)
    for error, args in (
        (TypeError, [out, out]),
        (TypeError, [out, 1, 1]),
        (TypeError, [out, out, out]),
        (TypeError, [out, out, 1.5]),
        (ValueError, [out, x[::2], 1]),
        (ValueError, [x[:5], x[4:], 1]),
    ):
        with pytest.raises(error):
            kernel(1, 64, 512, args)
    for launch in ((0, 64, 0), (1, 40, 0), (1, 64, 8), ((1, 1, 1, 1), 64, 0)):
        with pytest.raises(ValueError, match="="):
            kernel(*launch, [out, out, -1])


def test_compiler_is_asked_and_its_errors_are_told(build, monkeypatch):
    with pytest.raises(emulate.CompilationError, match="NOWHERE"):
        build("#include <warp.cuh>\nvoid k() { NOWHERE; }", "k")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(emulate.CompilerMissing, match=r"g\+\+"):
        build(FAULTS, "faults")
