"""The emulator of CUDA kernels: what it computes against numpy, and that it sees mistakes."""

import ml_dtypes
import numpy as np
import pytest

from kernels_pallas.cuda import emulate

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
  loaded[lane] = make_uint4(word[0], word[1], word[2], word[3]);
  transposed[lane] = transpose(word[3]);

  const u32 two = halves[2 * lane] | u32(halves[2 * lane + 1]) << 16;
  widened[2 * lane] = low(two);
  widened[2 * lane + 1] = high(two);
  packed[lane] = pack_bf16(pairs[lane].x, pairs[lane].y);

  shuffled[lane] = __shfl_xor_sync(~0u, a[lane], 5);
  shuffled[32 + lane] = __shfl_sync(~0u, lane * lane, from);
  // Halves of a warp apart.
  if (lane < 16) shuffled[64 + lane] = __shfl_xor_sync(0xffffu, a[lane], 8);
  else shuffled[64 + lane] = __shfl_sync(0xffff0000u, -a[lane], 16);

  const float x = __ldg(a + lane);
  computed[lane] = fmaf(x, scale, 1.0f) + rsqrtf(4.0f) + sqrtf(4.0f) + __fdividef(x, 4.0f) + __expf(0.0f);
  computed[32 + lane] = fmaxf(x, min(max(lane, 3), 20));
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
    shuffled, computed = np.zeros((3, 32), F32), np.zeros((2, 32), F32)
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
    np.testing.assert_array_equal(shuffled[0], x[lanes ^ 5])
    np.testing.assert_array_equal(shuffled[1], np.full(32, 49))
    np.testing.assert_array_equal(shuffled[2], np.where(lanes < 16, x[lanes ^ 8], -x[16]))
    np.testing.assert_allclose(computed[0], 0.75 * x + 4.5, rtol=1e-6)
    np.testing.assert_array_equal(computed[1], np.maximum(x, lanes.clip(3, 20)))


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


HANDSHAKE = """
#include "warp.cuh"
// Block i reads what block i + 1 wrote, the last one writes 1. The last to end counts.
extern "C" __global__ void handshake(int* flags, int* y, int* ended, int waits) {
  const int block = blockIdx.x + gridDim.x * blockIdx.y, blocks = gridDim.x * gridDim.y, t = threadIdx.x;
  int* own = y + block * blockDim.x;
  if (waits && t == 0 && block + 1 < blocks)
    while (load_flag(flags + block + 1) < 1) SPIN();
  __syncthreads();
  own[t] = block + 1 < blocks ? own[2 * blockDim.x - 1 - t] + 1 : 1;
  __syncthreads();
  if (t) return;
  signal(flags + block, 1);
  __threadfence();
  if (atomicAdd(ended, 1) == blocks - 1) ended[1] = block + blockIdx.z + 100;
}
"""


def test_blocks_wait_for_each_other(build):
    kernel = build(HANDSHAKE, "handshake")

    def run(waits, **options):
        flags, y, ended = np.zeros(6, I32), np.zeros((6, 64), I32), np.zeros(2, I32)
        kernel((3, 2), 64, 0, [flags, y, ended, waits], **options)
        assert flags.all()
        assert ended[0] == 6
        assert 100 <= ended[1] < 106
        return (y == np.arange(6, 0, -1)[:, None]).all()

    assert all(run(True, seed=seed) for seed in SEEDS)
    assert not all(run(False, seed=seed) for seed in SEEDS)
    with pytest.raises(emulate.EmulationError, match=r"deadlock.*2 of 6 blocks") as error:
        run(True, resident=2)
    place = "block (1, 0, 0) warp 0: lane 0 at SPIN (handshake.cu:8), lanes 1-31 at __syncthreads"
    assert place in str(error.value)


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
    case 3: while (load_flag(numbers) < 1) SPIN(); break;
    case 4: while (load_flag(numbers) < 1); break;
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
        (1, "divergence.*warp 1: lanes 0-7 at __syncwarp .*, lanes 8-31 at __syncthreads"),
        (2, "divergence.*warp 1: lanes 0-7 ended, lanes 8-31 at __syncwarp"),
        (3, "(?s)deadlock.*warp 0: lanes 0-31 at SPIN .*warp 1: lanes 0-31 at SPIN"),
        (4, "polled for ever"),
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
