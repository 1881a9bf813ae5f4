// A tile of backward.cu: its layout in shared memory, how it is loaded and written out, and the sums over columns.
#pragma once
#include "boundary/tile.cuh"

namespace {

constexpr int K = N * C;
constexpr int OF_DS = HC ? N : 3;             // pieces of 8 columns that ds has
constexpr int DPHI = HC ? 1 : 2 * OF_DS;      // products that a warp sums for dphi or dtheta
constexpr int SUMS = N * N + N + LOOK_AHEAD * N;  // of a token: dh_res, dh_post, dh_pre
constexpr bool KAPPA_PRE = !LOOK_AHEAD;
// Whether x' comes before g: what it takes to make d leaves no registers for both.
constexpr bool FIRST = LOOK_AHEAD || (NORM && MIX);
constexpr int STAGES = 3;                     // tiles in shared memory: filled, computed in, written out

// A tile in shared memory. Rows of x and g by stream and token, then y, d; once read, each warp writes dx over g
// and dy over d in its own columns. With LOOK_AHEAD dy goes to memory at once and d gives place to the warp's part of
// dh_pre, four floats a token, which are as many bytes as its columns of d; a place of its own would cost the second
// program of a multiprocessor, and a shared one a second barrier. The 16-byte chunks of a row are permuted, chunk c to place c ^ key, so that
// neither 8 tokens of a stream nor 4 tokens of 2 streams meet in one bank.
constexpr int STREAMS = N * TOKENS * PITCH;
constexpr int X = 0, G = STREAMS, Y = 2 * STREAMS, D = Y + TOKENS * PITCH, STAGE = D + TOKENS * PITCH;
// Data of tokens: ds in the order of the lanes for both products, h_res 80 bytes apart, h_post, h_pre, kappa.
constexpr int DS_BYTES = TOKENS * 8 * OF_DS * 4;
constexpr int DS = 0, DS_PAIRS = DS + DS_BYTES, RES = DS_PAIRS + DS_BYTES, RES_PITCH = 80;
constexpr int POST = RES + TOKENS * RES_PITCH, PRE = POST + TOKENS * 16, KAPPA = PRE + TOKENS * 16;
constexpr int OF_KAPPA = HC ? 16 : 4;          // bytes of a token
constexpr int INVERSE = KAPPA + (1 + KAPPA_PRE) * TOKENS * OF_KAPPA;  // NORM: inverse, kappa_n, two unused
constexpr int OWN = INVERSE + NORM * TOKENS * 16;
// Shared memory holds the rows of STAGES tiles, the token data of two, phi (6 float4 a thread; HC: a float2) and, if
// MIX, t in bfloat16, laid out as x: of two tiles in turn, or (TERMS 2) high and low terms of one.
constexpr int OWNS = STAGES * STAGE, PHI = OWNS + 2 * OWN, TOTAL = PHI + (HC ? 8 : 6 * 16) * THREADS;
static_assert(SHARED_BYTES == TOTAL + MIX * 2 * STREAMS, "cuda_launches.py counts otherwise");
static_assert(SUMS == TOKEN_SUMS, "cuda_launches.py counts otherwise");

__device__ __forceinline__ int key(int stream, int token) { return token % 8 ^ stream % 2 * 4; }

struct Arrays {
  const bf16 *x, *y;
  const float *post, *res;
  const bf16 *g, *d;
  const float *pre, *ds;
  const bf16* ds_pairs;
  const float *kappa, *kappa_pre, *inverse;
};

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

// A thread's piece of the token data: 16 bytes of token `token`, of `stride` bytes a tile. It is 4 bytes of kappa if
// `stride` is 64, and nothing if it is 0.
struct Coefficients {
  const unsigned char* from;
  int stride, to, token;

  __device__ __forceinline__ Coefficients(const Arrays& a, u32 thread) : token(thread % TOKENS) {
#if HC
    constexpr u32 HALF = DS_BYTES / 16;
    static_assert(2 * HALF == THREADS, "load_tile has what is left");
    const u32 at = thread % HALF * 16;
    from = (thread < HALF ? reinterpret_cast<const unsigned char*>(a.ds)
                          : reinterpret_cast<const unsigned char*>(a.ds_pairs)) + at;
    stride = DS_BYTES, to = (thread < HALF ? DS : DS_PAIRS) + at, token = 0;
#else
    const u32 part = thread / TOKENS, t = thread % TOKENS;
    const void* array = a.kappa;
    u32 at = t * 4;
    stride = TOKENS * 4, to = KAPPA + at;
    if (part < 12) {
      array = part < 6 ? static_cast<const void*>(a.ds) : a.ds_pairs;
      at = thread % (6 * TOKENS) * 16, to = (part < 6 ? DS : DS_PAIRS) + at;
      stride = TOKENS * M * 4, token = 0;
    } else if (part < 14) {
      array = part == 12 ? a.pre : a.post;
      at = t * 16, to = (part == 12 ? PRE : POST) + at;
      stride = part == 12 || MIX ? TOKENS * 16 : 0;
    } else if (KAPPA_PRE && part > 14) {
      array = a.kappa_pre;
      to += TOKENS * OF_KAPPA;
    } else if (NORM && part > 14) {
      array = a.inverse;
      at = t * 16, to = INVERSE + at;
      stride = TOKENS * 16;
    } else if (part > 14) {
      stride = 0;
    }
    from = static_cast<const unsigned char*>(array) + at;
#endif
  }
};

__device__ __forceinline__ void load_tile(unsigned char* stage, unsigned char* own, const Arrays& a,
                                          const Share& share, const Coefficients& c, int first, int T) {
  const bool inside = first + share.token < T;
  const u32 stream = share.stream(first);
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    unsigned char* to = stage + share.streams + 2 * pair * TOKENS * PITCH;
    copy_async_16(to + X, chunk(a.x, stream + pair * (2 * C / 8)), inside);
    copy_async_16(to + G, chunk(a.g, stream + pair * (2 * C / 8)), inside);
  }
  if (MIX || share.half)
    copy_async_16(stage + share.single + (share.half ? D : Y), chunk(share.half ? a.d : a.y, share.row(first)),
                  inside);
  const unsigned char* from = c.from + static_cast<u32>(first / TOKENS * c.stride);
  const bool valid = first + c.token < T;
  if (c.stride > 64) copy_async_16(own + c.to, from, valid);
  if (c.stride == 64) copy_async_4(own + c.to, from, valid);
  if (MIX && threadIdx.x < 4 * TOKENS) {
    const int t = threadIdx.x / 4, part = threadIdx.x % 4;
    copy_async_16(own + RES + t * RES_PITCH + part * 16, chunk(a.res, (first + t) * N + part), first + t < T);
  }
  if (!HC && NORM && !LOOK_AHEAD && threadIdx.x / TOKENS == 4) {
    const int t = threadIdx.x % TOKENS;
    copy_async_16(own + INVERSE + t * 16, chunk(a.inverse, first + t), first + t < T);
  }
  if (HC && threadIdx.x >= 4 * TOKENS && threadIdx.x < (8 + NORM) * TOKENS) {
    const int t = threadIdx.x % TOKENS, part = threadIdx.x / TOKENS - 4;
    const float* array = part == 0 ? a.post : part == 1 ? a.pre : part == 2 ? a.kappa : a.kappa_pre;
    if (NORM && part == 4) array = a.inverse;
    copy_async_16(own + POST + (part * TOKENS + t) * 16, chunk(array, first + t), first + t < T);
  }
}

// Writes the results of `compute_tile` from shared memory.
__device__ __forceinline__ void store_tile(const unsigned char* stage, const Share& share, bf16* dx, bf16* dy,
                                           int first, int T) {
  if (first + share.token >= T) return;
  const u32 stream = share.stream(first);
  const unsigned char* from = stage + share.streams + G;
  // dx is not needed soon: L2 keeps the sums for the kernel behind.
  store_once(chunk(dx, stream), *reinterpret_cast<const uint4*>(from));
  store_once(chunk(dx, stream + 2 * C / 8), *reinterpret_cast<const uint4*>(from + 2 * TOKENS * PITCH));
  if (MIX && !LOOK_AHEAD && share.half == 0)
    *chunk(dy, share.row(first)) = *reinterpret_cast<const uint4*>(stage + share.single + D);
}

// Computes dh_res and dh_post of 4 tokens over the program's columns: rows are token + 4 stream of t, columns
// 2 token + j of x or of y (twice). Warps 0-3 take streams 0, 1 of x, warps 4-7 streams 2, 3.
struct Sums {
  u32 a[TERMS][4][4], b[2][4], y[2][4];

  __device__ __forceinline__ void load_total(const unsigned char* total, int warp, int lane) {
    const int a_token = warp % 4 * 4 + lane % 4, a_stream = lane / 4 % 4;
    const unsigned char* a_row = total + (a_stream * TOKENS + a_token) * PITCH;
#pragma unroll
    for (int term = 0; term < TERMS; ++term) {
#pragma unroll
      for (int k = 0; k < 4; ++k)
        load_matrices(a[term][k], a_row + term * STREAMS + (2 * k + lane / 16 ^ key(a_stream, a_token)) * 16);
    }
  }
  __device__ __forceinline__ void load_update(const unsigned char* stage, int warp, int lane) {
    const int b_token = warp % 4 * 4 + lane % 8 / 2, b_stream = warp / 4 * 2 + lane % 2;
    const unsigned char* b_row = stage + X + (b_stream * TOKENS + b_token) * PITCH;
    const unsigned char* y_row = stage + Y + b_token * PITCH;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      load_matrices(b[k], b_row + (4 * k + lane / 8 ^ key(b_stream, b_token)) * 16);
      load_matrices(y[k], y_row + (4 * k + lane / 8 ^ key(0, b_token)) * 16);
    }
  }
  __device__ __forceinline__ void store(float* sums, int warp, int lane, u32 first_row, int tokens) const {
    float res[4] = {}, post[4] = {};
#pragma unroll
    for (int term = 0; term < TERMS; ++term) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        multiply_bf16(res, a[term][k], b[k / 2][k % 2 * 2], b[k / 2][k % 2 * 2 + 1]);
        multiply_bf16(post, a[term][k], y[k / 2][k % 2 * 2], y[k / 2][k % 2 * 2 + 1]);
      }
    }
    // Lane 4 g + q holds row g: token g % 4, stream g / 4. It keeps the column of that token, q.
    const int token = warp % 4 * 4 + lane % 4, stream = lane / 16, pair = warp / 4;
    if (lane % 4 == lane / 4 % 4 && token < tokens) {
      const u32 at = (first_row + token) * (SUMS / 2);
      float2* out = reinterpret_cast<float2*>(sums) + at + stream * 2 + pair;
      out[0] = make_float2(res[0], res[1]);
      out[4] = make_float2(res[2], res[3]);
      float* out_post = sums + at * 2 + N * N + stream;
      if (pair == 0) out_post[0] = post[0], out_post[2] = post[2];
    }
  }
};

// Adds up the warps' parts of dh_pre, which `compute_tile` has left in place of d. Eight lanes have the parts of a
// token; each keeps half of the streams, then one.
__device__ __forceinline__ void store_pre(const unsigned char* stage, float* sums, int lane, u32 first_row,
                                          int tokens) {
  const int token = threadIdx.x / WARPS, place = threadIdx.x % WARPS;
  if (token >= TOKENS) return;  // whole warps
  const float4 part = *reinterpret_cast<const float4*>(stage + D + token * PITCH + place * 16);
  const bool odd = lane & 1, upper = lane & 2;
  float first = odd ? part.z : part.x, second = odd ? part.w : part.y;
  first += __shfl_sync(0xffffffffu, odd ? part.x : part.z, lane ^ 1);
  second += __shfl_sync(0xffffffffu, odd ? part.y : part.w, lane ^ 1);
  float total = (upper ? second : first) + __shfl_sync(0xffffffffu, upper ? first : second, lane ^ 2);
  total += __shfl_sync(0xffffffffu, total, lane ^ 4);
  if (place < N && token < tokens) sums[(first_row + token) * SUMS + N * N + N + 2 * odd + upper] = total;
}

}  // namespace
