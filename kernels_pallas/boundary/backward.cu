// Backward of a boundary from the cotangents of its projection on, one pass over the streams (n = 4, bfloat16).
//
// A program owns COLUMNS columns of all four streams and walks over tiles of 16 tokens, so that dphi stays in
// registers; each warp owns 8 of these columns. With x' = h_res x + h_post y (recomputed: reading it costs 4C):
//
//   t   = g + h_pre d + ds phi^T + x' dr / (n C r)       cotangent of x', in float32
//   dx  = h_res^T t,   dy = h_post^T t,   dh_res = t x^T,   dh_post = t y,   dphi = x'^T ds
//
// Reads x, g (4C each), y, d, writes dx, dy: 15C. Without MIX (the backward of `read`) x is x' and dx is t: 13C.
// ds phi^T and dphi are products of TF32 numbers, exact operands. The sums over columns in dh_res and dh_post are
// tensor-core products too, of t rounded to bfloat16: 4 tokens x 4 streams of t against 4 tokens x 2 streams of x,
// of which a quarter, the same token, is kept. They leave as partial sums, one a program and token.
//
// Constants: C, MIX (0 or 1), STAGES (tiles in shared memory).
#include "cuda/warp.cuh"

namespace {

constexpr int N = 4, M = N * N + 2 * N, K = N * C;
constexpr int TOKENS = 16;                   // of a tile
constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int COLUMNS = 8 * WARPS;           // of a program, per stream
constexpr int SUMS = N * N + N;              // of a token: dh_res, dh_post

// A tile in shared memory. Rows of 128 bytes: x and g by stream and token, then y, d; once read, each warp writes
// dx over g and dy over d in its own columns. The 16-byte chunks of a row are permuted (`key`), so that neither 8
// tokens of a stream nor 4 tokens of 2 streams meet in one bank.
constexpr int PITCH = 2 * COLUMNS;
constexpr int X = 0, G = N * TOKENS, Y = 2 * G, D = Y + TOKENS, ROWS = D + TOKENS;
constexpr int DS = ROWS * PITCH;             // [16, 24] float32, 28 numbers apart
constexpr int DS_PITCH = 28;
constexpr int RES = DS + TOKENS * DS_PITCH * 4;  // [16, 16] float32, 80 bytes apart
constexpr int RES_PITCH = 80;
constexpr int POST = RES + TOKENS * RES_PITCH, PRE = POST + TOKENS * 16;
constexpr int DR = PRE + TOKENS * 16, R = DR + TOKENS * 4;
constexpr int STAGE = (R + TOKENS * 4 + 127) / 128 * 128;
constexpr int PHI = STAGES * STAGE;          // 6 float4 a thread
constexpr int TOTAL = PHI + 6 * 16 * THREADS;    // t in bfloat16, rows as x; of two tiles
constexpr int TOTAL_SIZE = N * TOKENS * PITCH;

__device__ __forceinline__ int key(int stream, int token) { return token % 8 ^ stream % 2 * 4; }

struct Arrays {
  const bf16 *x, *y;
  const float *post, *res;
  const bf16 *g, *d;
  const float *pre, *ds, *dr, *r;
};

// Memory in units of 16 bytes: one register an index, and the address in one instruction.
__device__ __forceinline__ const uint4* chunk(const void* array, u32 index) {
  return static_cast<const uint4*>(array) + index;
}
__device__ __forceinline__ uint4* chunk(void* array, u32 index) { return static_cast<uint4*>(array) + index; }

// The part of a tile that a thread moves: 16 bytes of five rows, streams `half` and `half + 2` of x, g, dx, and
// y, dy (half 0) or d (half 1).
struct Share {
  int token, half, column;    // column in chunks
  int streams, single;        // where the chunk lies in shared memory, from the first row of x or of y

  __device__ __forceinline__ Share(u32 thread, int slab)
      : token(thread / WARPS % TOKENS), half(thread / (WARPS * TOKENS)), column(slab * WARPS + thread % WARPS) {
    const int chunk = thread % WARPS;
    streams = (half * TOKENS + token) * PITCH + (chunk ^ key(half, token)) * 16;
    single = token * PITCH + (chunk ^ key(0, token)) * 16;
  }
  __device__ __forceinline__ u32 stream(int first) const { return ((first + token) * N + half) * (C / 8) + column; }
  __device__ __forceinline__ u32 row(int first) const { return (first + token) * (C / 8) + column; }
};

// A thread's piece of one token's coefficients: 16 bytes, or 4 of those with one number a token; stride 0: nothing.
struct Coefficients {
  const float* from;
  int stride, to;

  __device__ __forceinline__ Coefficients(const Arrays& a, u32 thread) {
    const u32 part = thread / TOKENS, token = thread % TOKENS;
    if (part < 6)
      from = a.ds + part * 4, stride = M, to = DS + token * DS_PITCH * 4 + part * 16;
    else if (part == 6)
      from = a.pre, stride = N, to = PRE + token * 16;
    else if (part == 7)
      from = a.post, stride = MIX ? N : 0, to = POST + token * 16;
    else if (part < 12)
      from = a.res + (part - 8) * 4, stride = MIX ? N * N : 0, to = RES + token * RES_PITCH + (part - 8) * 16;
    else
      from = part == 12 ? a.dr : a.r, stride = part < 14 ? 1 : 0, to = (part == 12 ? DR : R) + token * 4;
    from += token * stride;
  }
};

__device__ __forceinline__ void load_tile(unsigned char* stage, const Arrays& a, const Share& share,
                                          const Coefficients& c, int first, int T) {
  const bool inside = first + share.token < T;
  const u32 stream = share.stream(first);
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    unsigned char* to = stage + share.streams + 2 * pair * TOKENS * PITCH;
    copy_async_16(to + X * PITCH, chunk(a.x, stream + pair * (2 * C / 8)), inside);
    copy_async_16(to + G * PITCH, chunk(a.g, stream + pair * (2 * C / 8)), inside);
  }
  if (MIX || share.half)
    copy_async_16(stage + share.single + (share.half ? D : Y) * PITCH,
                  chunk(share.half ? a.d : a.y, share.row(first)), inside);
  const float* from = c.from + static_cast<u32>(first * c.stride);
  const bool valid = first + static_cast<int>(threadIdx.x % TOKENS) < T;
  if (c.stride > 1) copy_async_16(stage + c.to, from, valid);
  if (c.stride == 1) copy_async_4(stage + c.to, from, valid);
}

// Writes what `compute_tile` left in shared memory.
__device__ __forceinline__ void store_tile(const unsigned char* stage, const Share& share, bf16* dx, bf16* dy,
                                           int first, int T) {
  if (first + share.token >= T) return;
  const u32 stream = share.stream(first);
  const unsigned char* from = stage + share.streams + G * PITCH;
  *chunk(dx, stream) = *reinterpret_cast<const uint4*>(from);
  *chunk(dx, stream + 2 * C / 8) = *reinterpret_cast<const uint4*>(from + 2 * TOKENS * PITCH);
  if (MIX && share.half == 0)
    *chunk(dy, share.row(first)) = *reinterpret_cast<const uint4*>(stage + share.single + D * PITCH);
}

// dh_res and dh_post of 4 tokens over the program's columns: rows token + 4 stream of t, columns 2 token + j of x
// or of y (twice). Warps 0-3 take streams 0, 1 of x, warps 4-7 streams 2, 3.
__device__ __forceinline__ void store_sums(const unsigned char* stage, const unsigned char* total, float* sums,
                                           int warp, int lane, u32 first_row, int tokens) {
  const int group = warp % 4 * 4, pair = warp / 4;
  const int a_token = group + lane % 4, a_stream = lane / 4 % 4;
  const int b_token = group + lane % 8 / 2, b_stream = 2 * pair + lane % 2;
  const unsigned char* a_row = total + (a_stream * TOKENS + a_token) * PITCH;
  const unsigned char* b_row = stage + (X + b_stream * TOKENS + b_token) * PITCH;
  const unsigned char* y_row = stage + (Y + b_token) * PITCH;
  u32 a[4][4], b[2][4], y[2][4];
#pragma unroll
  for (int k = 0; k < 4; ++k) load_matrices(a[k], a_row + (2 * k + lane / 16 ^ key(a_stream, a_token)) * 16);
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    load_matrices(b[k], b_row + (4 * k + lane / 8 ^ key(b_stream, b_token)) * 16);
    load_matrices(y[k], y_row + (4 * k + lane / 8 ^ key(0, b_token)) * 16);
  }
  float res[4] = {}, post[4] = {};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    multiply_bf16(res, a[k], b[k / 2][k % 2 * 2], b[k / 2][k % 2 * 2 + 1]);
    multiply_bf16(post, a[k], y[k / 2][k % 2 * 2], y[k / 2][k % 2 * 2 + 1]);
  }
  const int stream = lane / 16;  // lane = 4 g + q holds row g: token g % 4, stream g / 4
  if (lane % 4 == lane / 4 % 4 && a_token < tokens) {
    const u32 at = (first_row + a_token) * (SUMS / 2);
    float2* out = reinterpret_cast<float2*>(sums) + at + stream * 2 + pair;
    out[0] = make_float2(res[0], res[1]);
    out[4] = make_float2(res[2], res[3]);
    float* out_post = sums + at * 2 + N * N + stream;
    if (pair == 0) out_post[0] = post[0], out_post[2] = post[2];
  }
}

// Lane's element k of a fragment row: token g (k = 0, 1: columns 2q, 2q + 1) and token g + 8 (k = 2, 3).
__device__ __forceinline__ void unpack(float (&v)[4], u32 first, u32 second) {
  v[0] = low(first), v[1] = high(first), v[2] = low(second), v[3] = high(second);
}

__device__ __forceinline__ float4 load4(const unsigned char* p) { return *reinterpret_cast<const float4*>(p); }
__device__ __forceinline__ float at(const float4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

__device__ __forceinline__ void compute_tile(unsigned char* stage, unsigned char* total, const float4* phi,
                                             float (&dphi)[2][3][4], int warp, int lane) {
  const int g = lane / 4, q = lane % 4;
  // Lane's row for load_matrices: stream (of two) and half of the tokens by matrix.
  const int row = (lane / 16 * TOKENS + lane / 8 % 2 * 8 + lane % 8) * PITCH;
  const int streams_row = row + (warp ^ key(lane / 16, lane % 8)) * 16, single_row = row + (warp ^ lane % 8) * 16;
  u32 word[4];
  float x[N][4], t[N][4], y[4], d[4];
#pragma unroll
  for (int i = 0; i < N; i += 2) {
    load_matrices(word, stage + streams_row + (X + i * TOKENS) * PITCH);
    unpack(x[i], word[0], word[1]);
    unpack(x[i + 1], word[2], word[3]);
    load_matrices(word, stage + streams_row + (G + i * TOKENS) * PITCH);
    unpack(t[i], word[0], word[1]);
    unpack(t[i + 1], word[2], word[3]);
  }
  load_matrices(word, stage + single_row + Y * PITCH);
  unpack(y, word[0], word[1]);
  unpack(d, word[2], word[3]);

  // t += ds phi^T. Element k of a product's inner index m is 8 s + 2 k for k < 4, else 8 s + 2 (k - 4) + 1.
  const float* ds = reinterpret_cast<const float*>(stage + DS);
#pragma unroll
  for (int s = 0; s < 3; ++s) {
    const float2 a = *reinterpret_cast<const float2*>(ds + g * DS_PITCH + 8 * s + 2 * q);
    const float2 b = *reinterpret_cast<const float2*>(ds + (g + 8) * DS_PITCH + 8 * s + 2 * q);
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      const float4 p = phi[(s * 2 + i / 2) * THREADS];
      multiply_tf32(t[i], a.x, b.x, a.y, b.y, p.x, p.y);
      multiply_tf32(t[i + 1], a.x, b.x, a.y, b.y, p.z, p.w);
    }
  }

  const float* r = reinterpret_cast<const float*>(stage + R);
  const float* dr = reinterpret_cast<const float*>(stage + DR);
  const float kappa0 = __fdividef(dr[g], r[g] * K), kappa1 = __fdividef(dr[g + 8], r[g + 8] * K);
  const float4 pre0 = load4(stage + PRE + g * 16), pre1 = load4(stage + PRE + (g + 8) * 16);
  float4 post0, post1;
  float dx[N][4] = {}, dy[4] = {};
  if (MIX) post0 = load4(stage + POST + g * 16), post1 = load4(stage + POST + (g + 8) * 16);
  u32 across[N][2];  // x' with tokens along words: column g, tokens 2q, 2q + 1 (and + 8)
#pragma unroll
  for (int i = 0; i < N; ++i) {
    float4 res0, res1;
    float mixed[4];
    if (MIX) {
      res0 = load4(stage + RES + g * RES_PITCH + i * 16);
      res1 = load4(stage + RES + (g + 8) * RES_PITCH + i * 16);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float4& res = k < 2 ? res0 : res1;
      if (MIX) {
        mixed[k] = res.x * x[0][k];
        mixed[k] = fmaf(res.y, x[1][k], mixed[k]);
        mixed[k] = fmaf(res.z, x[2][k], mixed[k]);
        mixed[k] = fmaf(res.w, x[3][k], mixed[k]);
        mixed[k] = fmaf(at(k < 2 ? post0 : post1, i), y[k], mixed[k]);
      } else {
        mixed[k] = x[i][k];
      }
      t[i][k] = fmaf(at(k < 2 ? pre0 : pre1, i), d[k], t[i][k]);
      t[i][k] = fmaf(k < 2 ? kappa0 : kappa1, mixed[k], t[i][k]);
      if (MIX) {
        dx[0][k] = fmaf(res.x, t[i][k], dx[0][k]);
        dx[1][k] = fmaf(res.y, t[i][k], dx[1][k]);
        dx[2][k] = fmaf(res.z, t[i][k], dx[2][k]);
        dx[3][k] = fmaf(res.w, t[i][k], dx[3][k]);
        dy[k] = fmaf(at(k < 2 ? post0 : post1, i), t[i][k], dy[k]);
      } else {
        dx[i][k] = t[i][k];
      }
    }
    across[i][0] = transpose(pack_bf16(mixed[0], mixed[1]));
    across[i][1] = transpose(pack_bf16(mixed[2], mixed[3]));
  }

  // dphi += x'^T ds: two streams' columns as rows, tokens as inner index (2q, then 2q + 1).
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int s = 0; s < 3; ++s) {
      const float b0 = ds[(half * 8 + 2 * q) * DS_PITCH + 8 * s + g], b1 = ds[(half * 8 + 2 * q + 1) * DS_PITCH + 8 * s + g];
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const u32 first = across[2 * pair][half], second = across[2 * pair + 1][half];
        multiply_tf32(dphi[pair][s], low(first), low(second), high(first), high(second), b0, b1);
      }
    }
  }

  __syncwarp();
  const int even = g * PITCH + (warp ^ g) * 16 + q * 4, odd = g * PITCH + (warp ^ g ^ 4) * 16 + q * 4;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    unsigned char* out = stage + (i % 2 ? odd : even) + (G + i * TOKENS) * PITCH;
    *reinterpret_cast<u32*>(out) = pack_bf16(dx[i][0], dx[i][1]);
    *reinterpret_cast<u32*>(out + 8 * PITCH) = pack_bf16(dx[i][2], dx[i][3]);
    if (MIX) {
      out = total + (i % 2 ? odd : even) + i * TOKENS * PITCH;
      *reinterpret_cast<u32*>(out) = pack_bf16(t[i][0], t[i][1]);
      *reinterpret_cast<u32*>(out + 8 * PITCH) = pack_bf16(t[i][2], t[i][3]);
    }
  }
  if (MIX) {
    *reinterpret_cast<u32*>(stage + even + D * PITCH) = pack_bf16(dy[0], dy[1]);
    *reinterpret_cast<u32*>(stage + even + (D + 8) * PITCH) = pack_bf16(dy[2], dy[3]);
  }
}

}  // namespace

// Grid (C / COLUMNS, splits): program (slab, split) walks over tiles split, split + splits, ...
// x, g, dx [T, 4 C]; y, d, dy [T, C]; post, pre [T, 4]; res [T, 16]; phi [4 C, 24]; ds [T, 24]; dr, r [T];
// sums [C / COLUMNS, T, 20]; dphi [splits, 4 C, 24].
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    boundary_backward(const bf16* x, const bf16* y, const float* post, const float* res, const bf16* g,
                      const bf16* d, const float* pre, const float* phi, const float* ds, const float* dr,
                      const float* r, int T, bf16* dx, bf16* dy, float* sums, float* dphi_out) {
  SHARED_MEMORY(shared);
  const Arrays a = {x, y, post, res, g, d, pre, ds, dr, r};
  const u32 thread = threadIdx.x;
  const int warp = thread / 32, lane = thread % 32;
  const int slab = blockIdx.x, split = blockIdx.y, apart = gridDim.y * TOKENS;
  const Share share(thread, slab);
  const Coefficients coefficients(a, thread);
  int first = split * TOKENS;
  for (int s = 0; s < STAGES - 2; ++s) {
    if (first + s * apart < T) load_tile(shared + s * STAGE, a, share, coefficients, first + s * apart, T);
    copy_async_commit();
  }
  // phi as the right operand of ds phi^T, in this thread's own place.
  float4* own_phi = reinterpret_cast<float4*>(shared + PHI) + thread;
  const u32 column = slab * COLUMNS + warp * 8 + thread % 32 / 4;
  for (int s = 0; s < 3; ++s) {
    for (int i = 0; i < N; i += 2) {
      const float* row = phi + (static_cast<long long>(i) * C + column) * M + 8 * s + thread % 4 * 2;
      own_phi[(s * 2 + i / 2) * THREADS] = make_float4(row[0], row[1], row[C * M], row[C * M + 1]);
    }
  }
  float dphi[2][3][4] = {};

  // A tile's buffer is filled, computed in and written out in STAGES - 2, 1 and 1 steps between barriers.
  int current = 0, parity = 0;
  for (; first - apart < T; first += apart) {
    copy_async_wait<STAGES - 3>();
    __syncthreads();
    const int ahead = first + (STAGES - 2) * apart, next = (current + STAGES - 2) % STAGES;
    if (ahead < T) load_tile(shared + next * STAGE, a, share, coefficients, ahead, T);
    copy_async_commit();
    if (first >= apart) {
      const unsigned char* before = shared + (current + STAGES - 1) % STAGES * STAGE;
      const int tile = first - apart;
      store_tile(before, share, dx, dy, tile, T);
      if (MIX)
        store_sums(before, shared + TOTAL + (parity ^ 1) * TOTAL_SIZE, sums, warp, lane, slab * T + tile,
                   T - tile);
    }
    if (first >= T) break;
    compute_tile(shared + current * STAGE, shared + TOTAL + parity * TOTAL_SIZE, own_phi, dphi, warp, lane);
    current = (current + 1) % STAGES;
    parity ^= 1;
  }

  float* out = dphi_out + static_cast<long long>(split) * K * M;
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
#pragma unroll
    for (int s = 0; s < 3; ++s) {
      float* row = out + (static_cast<long long>(2 * pair) * C + column) * M + 8 * s + thread % 4 * 2;
      *reinterpret_cast<float2*>(row) = make_float2(dphi[pair][s][0], dphi[pair][s][1]);
      *reinterpret_cast<float2*>(row + C * M) = make_float2(dphi[pair][s][2], dphi[pair][s][3]);
    }
  }
}
