// Forward of a boundary in one pass over the streams (n = 4, bfloat16): the write of one sublayer, the projection of
// the next and its layer input.
//
//   x' = h_res x + h_post y,   s = x' phi,   r = ||x'|| / sqrt(n C),   h_pre = sigmoid(alpha s / r + bias),
//   layer input = h_pre x', with NORM divided by its root mean square, times weight
//
// Reads x (4C), y, writes x' (4C) and the layer input: 10C. Without MIX (`read`) x is x': 5C. The layer input needs
// sums over whole rows, so programs work together: a program owns 64 columns of all streams (a slab) and walks over
// tiles of 16 tokens; the programs of all slabs walk over the same tiles. Each leaves its partial sums of s and of
// the inner products of the streams (whose trace gives r, and h_pre' (x' x'^T) h_pre the norm of the layer
// input) in L2; LEAD steps later one of them, in turn, adds them up and publishes h_pre; DELAY steps later all
// make their columns of the layer input from x', which L2 still holds. Nobody waits as long as they keep pace. No
// deadlock: programs start in the order of their index, slabs first, and wait for programs of their own split only.
//
// Constants: C, MIX, NORM (0 or 1), NORM_EPS, INPUT_EPS.
#include "boundary/tile.cuh"

namespace {

constexpr int SLABS = C / COLUMNS;
constexpr int STAGES = 3;                    // tiles of x: filled, computed in, summed
constexpr int LEAD = 4, DELAY = 12;
constexpr int PARTS = M + N * N;             // of a token: s, inner products of the streams
constexpr int READY = 8;                     // numbers of a token that are published: h_pre, 1 / norm

// Shared memory. A stage: x, y, then h_res (80 bytes a token) and h_post.
constexpr int Y = STREAMS, RES = Y + TOKENS * PITCH, RES_PITCH = 80, POST = RES + TOKENS * RES_PITCH;
constexpr int STAGE = POST + TOKENS * 16;
constexpr int MIXED = STAGES * STAGE;                        // x' of two tiles, if MIX
constexpr int AGAIN = MIXED + (MIX ? 2 * STREAMS : 0);       // x' of two earlier tiles, for the layer input
constexpr int PRE = AGAIN + 2 * STREAMS;                     // READY numbers a token, of three tiles
constexpr int PHI = PRE + 3 * TOKENS * READY * 4;            // uint4 by column tile, step of 16 rows and lane
constexpr int LEADER = PHI + 3 * 16 * 32 * 16;               // sums of one tile

struct Arrays {
  const bf16 *x, *y;
  const float *post, *res, *phi, *bias, *alpha, *weight;
  bf16 *mixed, *out;
  float *pre, *s, *r, *parts, *ready;
  int* flags;
};

__device__ __forceinline__ void load_tile(unsigned char* stage, const Arrays& a, const Share& share, int first,
                                          int T) {
  copy_streams(stage, share, a.x, first, T);
  if (!MIX) return;
  if (share.half == 0) {
    copy_async_16(stage + Y + share.single, chunk(a.y, share.row(first)), first + share.token < T);
  } else {
    const u32 thread = threadIdx.x - THREADS / 2, part = thread / TOKENS, token = thread % TOKENS;
    const bool valid = first + token < T;
    if (part < N)
      copy_async_16(stage + RES + token * RES_PITCH + part * 16, chunk(a.res, (first + token) * N + part), valid);
    else if (part == N)
      copy_async_16(stage + POST + token * 16, chunk(a.post, first + token), valid);
  }
}

// x' of one tile, this warp's columns.
__device__ __forceinline__ void mix_tile(unsigned char* mixed, const unsigned char* stage, const Columns& columns,
                                         int warp, int lane) {
  const int g = lane / 4;
  float x[N][4], y[4];
  columns.load(x, stage);
  columns.load(y, stage + Y);
  const float4 post0 = load4(stage + POST + g * 16), post1 = load4(stage + POST + (g + 8) * 16);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float4 res0 = load4(stage + RES + g * RES_PITCH + i * 16);
    const float4 res1 = load4(stage + RES + (g + 8) * RES_PITCH + i * 16);
    store_columns(mixed + i * TOKENS * PITCH, i, warp, lane, mix(res0, at(post0, i), x, y[0], 0),
                  mix(res0, at(post0, i), x, y[1], 1), mix(res1, at(post1, i), x, y[2], 2),
                  mix(res1, at(post1, i), x, y[3], 3));
  }
}

// Partial sums of one tile over the program's columns: warps 0-2 s, 8 columns each, the others inner products.
__device__ __forceinline__ void sum_tile(float* parts, const unsigned char* mixed, const uint4* phi, int warp,
                                         int lane) {
  const int g = lane / 4, q = lane % 4;
  if (warp < 3) {
    float s[4] = {};
    const int token = lane % 16;
#pragma unroll
    for (int k = 0; k < 16; ++k) {
      const int stream = k / 4;
      u32 a[4];
      load_matrices(a, mixed + (stream * TOKENS + token) * PITCH + (k % 4 * 2 + lane / 16 ^ key(stream, token)) * 16);
      const uint4 b = phi[(warp * 16 + k) * 32 + lane];
      multiply_bf16(s, a, b.x, b.y);
      multiply_bf16(s, a, b.z, b.w);
    }
    float* to = parts + g * PARTS + warp * 8 + q * 2;
    *reinterpret_cast<float2*>(to) = make_float2(s[0], s[1]);
    *reinterpret_cast<float2*>(to + 8 * PARTS) = make_float2(s[2], s[3]);
    return;
  }
  for (int unit = warp - 3; unit < 8; unit += 5) {
    float sum[4] = {};
    const TokenProducts products(unit, lane, mixed);
    products.sum(sum, lane, mixed + products.pair * 2 * TOKENS * PITCH, TOKENS * PITCH);
    if (products.holds) {
      float* to = parts + products.token * PARTS + M + products.stream * N + products.pair * 2;
      *reinterpret_cast<float2*>(to) = make_float2(sum[0], sum[1]);
      *reinterpret_cast<float2*>(to + 2 * N) = make_float2(sum[2], sum[3]);
    }
  }
}

__device__ __forceinline__ void wait_for(const int* flag, int value) {
  while (load_flag(flag) < value) SPIN();
}

// Adds up the partial sums of all slabs [SLABS, 16, PARTS] and publishes h_pre and 1 / norm of a tile.
__device__ __forceinline__ void lead(float4* sums, const Arrays& a, const float* parts, float* ready, int first,
                                     int T) {
  const int thread = threadIdx.x;
  constexpr int QUADS = TOKENS * PARTS / 4;
  if (thread < QUADS) {
    float4 total = make_float4(0, 0, 0, 0);
    const float4* from = reinterpret_cast<const float4*>(parts) + thread;
#pragma unroll 10
    for (int slab = 0; slab < SLABS; ++slab) {
      const float4 v = load_uncached(from + slab * QUADS);
      total.x += v.x, total.y += v.y, total.z += v.z, total.w += v.w;
    }
    sums[thread] = total;
  }
  __syncthreads();
  const float* all = reinterpret_cast<const float*>(sums);
  for (int i = thread; i < TOKENS * M; i += THREADS)
    if (first + i / M < T) a.s[(first + i / M) * M + i % M] = all[i / M * PARTS + i % M];
  if (thread < TOKENS) {
    const float* s = all + thread * PARTS;
    const float* products = s + M;
    float squares = 0, norm = 0;
    for (int i = 0; i < N; ++i) squares += products[i * N + i];
    const float r = sqrtf(squares / K + NORM_EPS);
    float pre[N];
    for (int i = 0; i < N; ++i) pre[i] = 1.0f / (1.0f + expf(-(s[i] / r * a.alpha[0] + a.bias[i])));
    for (int i = 0; i < N; ++i) {
      float row = 0;
      for (int j = 0; j < N; ++j) row = fmaf(products[i * N + j], pre[j], row);
      norm = fmaf(pre[i], row, norm);
    }
    const float4 h = make_float4(pre[0], pre[1], pre[2], pre[3]);
    float4* to = reinterpret_cast<float4*>(ready) + thread * (READY / 4);
    to[0] = h;
    to[1] = make_float4(NORM ? rsqrtf(fmaxf(norm, 0.0f) / C + INPUT_EPS) : 1.0f, 0, 0, 0);
    if (first + thread < T) {
      reinterpret_cast<float4*>(a.pre)[first + thread] = h;
      a.r[first + thread] = r;
    }
  }
  __syncthreads();
}

// The layer input of one tile, 4 columns of one token a thread.
__device__ __forceinline__ void weigh_tile(const unsigned char* again, const float* pre, const Arrays& a,
                                           const float4& weight, int slab, int first, int T) {
  const int token = threadIdx.x / 16, piece = threadIdx.x % 16;
  if (first + token >= T) return;
  const float4 h = load4(pre + token * READY);
  float v[4];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const unsigned char* row = again + (i * TOKENS + token) * PITCH + (piece / 2 ^ key(i, token)) * 16;
    const uint2 x = *reinterpret_cast<const uint2*>(row + piece % 2 * 8);
    const float four[4] = {low(x.x), high(x.x), low(x.y), high(x.y)};
#pragma unroll
    for (int k = 0; k < 4; ++k) v[k] = i ? fmaf(at(h, i), four[k], v[k]) : at(h, i) * four[k];
  }
  if (NORM) {
    const float inverse = pre[token * READY + N];
#pragma unroll
    for (int k = 0; k < 4; ++k) v[k] *= inverse * at(weight, k);
  }
  const u32 to = (first + token) * (C / 4) + slab * (COLUMNS / 4) + piece;
  reinterpret_cast<uint2*>(a.out)[to] = make_uint2(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]));
}

}  // namespace

// Grid (C / 64, splits): program (slab, split) walks over tiles split, split + splits, ... of x [T, 4 C], y [T, C],
// post [T, 4], res [T, 16]; phi [4 C, 24], bias [24], alpha [3], weight [C]. Writes mixed = x' [T, 4 C] (if MIX),
// out [T, C], pre [T, 4], s [T, 24], r [T]. For the programs' own use: parts [splits, DELAY, SLABS, 16, PARTS],
// ready [tiles, 16, READY], flags [2, tiles], which begins as zeros.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    boundary_forward(const bf16* x, const bf16* y, const float* post, const float* res, const float* phi,
                     const float* bias, const float* alpha, const float* weight, int T, bf16* mixed, bf16* out,
                     float* pre, float* s, float* r, float* parts, float* ready, int* flags) {
  SHARED_MEMORY(shared);
  const Arrays a = {x, y, post, res, phi, bias, alpha, weight, mixed, out, pre, s, r, parts, ready, flags};
  const u32 thread = threadIdx.x;
  const int warp = thread / 32, lane = thread % 32;
  const int slab = blockIdx.x, split = blockIdx.y, splits = gridDim.y, tiles = (T + TOKENS - 1) / TOKENS;
  const int steps = (tiles - split + splits - 1) / splits;
  const Share share(thread, slab);
  const Columns columns(warp, lane);
  const bf16* streams = MIX ? mixed : x;

  if (steps > 0) load_tile(shared, a, share, split * TOKENS, T);
  copy_async_commit();
  copy_async_commit();
  // phi as pairs of bfloat16, high and low, in the lanes' places as right operand.
  uint4* own_phi = reinterpret_cast<uint4*>(shared + PHI);
  for (int i = thread; i < 3 * 16 * 32; i += THREADS) {
    const int row = i / 32 % 16 / 4 * C + slab * COLUMNS + i / 32 % 4 * 16 + i % 4 * 2, column = i / 512 * 8 + i % 32 / 4;
    u32 word[2][2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float v0 = phi[(row + 8 * k) * M + column], v1 = phi[(row + 8 * k + 1) * M + column];
      word[0][k] = pack_bf16(v0, v1);
      word[1][k] = pack_bf16(v0 - low(word[0][k]), v1 - high(word[0][k]));
    }
    own_phi[i] = make_uint4(word[0][0], word[0][1], word[1][0], word[1][1]);
  }
  float4 own_weight = make_float4(1, 1, 1, 1);
  if (NORM) own_weight = reinterpret_cast<const float4*>(weight)[slab * (COLUMNS / 4) + thread % 16];

  // What lies where in a step: tile k is computed, k + 1 on its way, k - 1 is written out and summed, k - DELAY
  // gets its layer input.
  int* counts = flags;
  int* published = flags + tiles;
  for (int k = 0; k < steps + DELAY; ++k) {
    copy_async_wait<1>();  // all but h_pre for the step after this one
    __syncthreads();
    const int first = (split + k * splits) * TOKENS, apart = splits * TOKENS;
    const int late = k - DELAY, sent = k + 2 - DELAY;  // tiles whose layer input is due now, whose h_pre is fetched
    if (k + 1 < steps) load_tile(shared + (k + 1) % STAGES * STAGE, a, share, first + apart, T);
    if (late >= -1 && late + 1 < steps)
      copy_streams(shared + AGAIN + (k + 1) % 2 * STREAMS, share, streams, first + (1 - DELAY) * apart, T);
    copy_async_commit();
    // Asked for now, needed at the end of the step.
    const bool fetches = warp == 0 && sent >= 0 && sent < steps;
    const int* flag = published + split + sent * splits;
    const int known = fetches ? load_flag(flag) : 0;

    if (thread == 0 && k >= 2 && k < steps + 2) signal(counts + split + (k - 2) * splits, 1);
    if (k >= 1 && k <= steps) {
      const unsigned char* before =
          MIX ? shared + MIXED + (k + 1) % 2 * STREAMS : shared + (k + STAGES - 1) % STAGES * STAGE;
      if (MIX) store_streams(mixed, share, before, first - apart, T);
      sum_tile(parts + ((split * DELAY + (k - 1) % DELAY) * SLABS + slab) * (TOKENS * PARTS), before, own_phi, warp,
               lane);
    }
    const int led = k - LEAD;
    if (led >= 0 && led < steps && led % SLABS == slab) {
      const int tile = split + led * splits;
      if (thread == 0) wait_for(counts + tile, SLABS);
      __syncthreads();
      lead(reinterpret_cast<float4*>(shared + LEADER), a,
           parts + (split * DELAY + led % DELAY) * SLABS * (TOKENS * PARTS), ready + tile * (TOKENS * READY),
           tile * TOKENS, T);
      if (thread == 0) signal(published + tile, 1);
    }
    if (MIX && k < steps) mix_tile(shared + MIXED + k % 2 * STREAMS, shared + k % STAGES * STAGE, columns, warp, lane);
    if (late >= 0 && late < steps)
      weigh_tile(shared + AGAIN + k % 2 * STREAMS, reinterpret_cast<const float*>(shared + PRE) + k % 3 * (TOKENS * READY),
                 a, own_weight, slab, first - DELAY * apart, T);
    if (fetches) {
      if (!known) wait_for(flag, 1);
      copy_async_16(shared + PRE + ((k + 2) % 3 * 32 + lane) * 16, chunk(ready, (split + sent * splits) * 32 + lane), true);
    }
    copy_async_commit();
  }
}
