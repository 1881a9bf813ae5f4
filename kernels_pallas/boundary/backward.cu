// Backward of a boundary from the cotangents of its projection on, one pass over the streams (n = 4, bfloat16).
//
// Let x' = h_res x + h_post y, s = x' phi, and r be the root of the mean square of x'. The cotangents are g of x' (from
// the next write), d of the layer input h_pre x', ds and dr:
//
//   t   = g + h_pre d + ds phi^T + kappa x'     cotangent of x' in float32, kappa = dr / (n C r)
//   dx  = h_res^T t,   dy = h_post^T t,   dh_res = t x^T,   dh_post = t y,   dphi = x'^T ds
//
// x' is computed again, because reading it would cost 4C, and rounded as in the forward. The kernel reads x, g (4C
// each), y, d and writes dx, dy: 15C. Without MIX (the backward of `read`) x is x' and dx is t: 13C.
//
// A program owns 64 columns of all four streams and walks over tiles of 16 tokens, so that dphi stays in registers.
// Each of its warps owns 8 columns. Operands are exact: ds phi^T is a product of TF32 numbers, dphi one of bfloat16
// numbers (ds as high + low). The sums over columns in dh_res and dh_post are tensor-core products of bfloat16
// numbers too: 4 tokens x 4 streams of t times 4 tokens x 2 streams of x. A quarter of the result, that of equal
// tokens, is used. A program writes a partial sum for each token: 80 bytes for 64 columns, 0.6C.
//
// With NORM d is the cotangent of the layer input behind its norm, w the norm's weight; the tokens' inverse and kappa_n
// come with the coefficients:
//
//   u = h_pre x',   d <- inverse w d - kappa_n u,   dw = inverse d u
//
// With LOOK_AHEAD (needs MIX) the read's h_pre was known before the write, so that its cotangent is a sum of this pass
// too: dh_pre = x' d, in products of a warp's own columns, added up over the warps. The definitions differ behind the
// norm: with LOOK_AHEAD u is rounded before it is normed and d is not rounded, without it d is and u is not.
//
// With HC (Hyper-Connections) each stream has its own projection and norm, and all have the same theta [6, C]:
// t_j = g_j + h_pre_j d + ds_j theta + kappa_j x'_j with ds [4, 8] a token (two columns of zeros) and
// dtheta = sum_j ds_j^T x'_j. A stream then needs one product where mHC's phi needs three, and dtheta 4 registers.
//
// Without LOOK_AHEAD kappa is the sum of two arrays: what comes from dh_pre was made elsewhere than the rest.
//
// Constants: C; MIX, LOOK_AHEAD, NORM, HC (0 or 1; LOOK_AHEAD has no HC); TERMS, the bfloat16 numbers that stand for one number of t in the sums
// of dh_res and dh_post. With 2, high + low, they agree with the definition to 2^-17 (errors of 2e-6). With 1, t is
// rounded and x' in kappa x' is not (but for NORM): errors of 2e-3 in dh_res and dh_post and of 1e-6 in dx and dy, but
// 70 instructions and one barrier a tile fewer. Launches of few tokens have two (cuda_launches.py).
#include "boundary/tile.cuh"

#if LOOK_AHEAD
#define KERNEL mhc_look_ahead_backward
#elif HC && MIX
#define KERNEL mhc_hc_boundary_backward
#elif HC
#define KERNEL mhc_hc_read_backward
#elif MIX
#define KERNEL mhc_boundary_backward
#else
#define KERNEL mhc_read_backward
#endif

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

__device__ __forceinline__ float4 load4(const unsigned char* p) { return *reinterpret_cast<const float4*>(p); }

// kappa of a token, which has one, or (HC) one a stream; without LOOK_AHEAD the sum of two.
#if HC
__device__ __forceinline__ float4 load_kappa(const unsigned char* own, int token) {
  float4 v = load4(own + KAPPA + token * 16);
  if (KAPPA_PRE) {
    const float4 pre = load4(own + KAPPA + (TOKENS + token) * 16);
    v = make_float4(v.x + pre.x, v.y + pre.y, v.z + pre.z, v.w + pre.w);
  }
  return v;
}
__device__ __forceinline__ float of_stream(const float4& kappa, int i) { return at(kappa, i); }
#else
__device__ __forceinline__ float load_kappa(const unsigned char* own, int token) {
  const float* kappa = reinterpret_cast<const float*>(own + KAPPA);
  return KAPPA_PRE ? kappa[token] + kappa[TOKENS + token] : kappa[token];
}
__device__ __forceinline__ float of_stream(float kappa, int) { return kappa; }
#endif

// dphi += x'^T ds: two streams' columns as rows, the tokens as inner index. `across` is x' with tokens along words:
// column g, tokens 2q, 2q + 1 (and + 8).
// With HC dtheta += ds_j^T x'_j for every stream: high terms of ds in rows 0-7, low ones in rows 8-15.
__device__ __forceinline__ void add_dphi(float (&dphi)[DPHI][4], const u32 (&across)[N][2], const unsigned char* own,
                                         int lane, int tokens) {
  const int q = lane % 4;
  float part[4] = {};  // HC: tensor cores truncate when they accumulate, so a tile's sum is added in float32
#pragma unroll
  for (int s = 0; s < OF_DS; ++s) {
    uint4 b = *reinterpret_cast<const uint4*>(own + DS_PAIRS + (s * 32 + lane) * 16);  // high, low; high, low
    if (tokens < TOKENS) {  // ds of tokens beyond T was never written: zero it (t's rows of them are not stored)
      const u32 mask[2] = {2 * q < tokens ? 2 * q + 1 < tokens ? 0xffffffffu : 0xffffu : 0u,
                           2 * q + 8 < tokens ? 2 * q + 9 < tokens ? 0xffffffffu : 0xffffu : 0u};
      b.x &= mask[0], b.y &= mask[0], b.z &= mask[1], b.w &= mask[1];
    }
#if HC
    const u32 a[4] = {b.x, b.y, b.z, b.w};
    multiply_bf16(part, a, across[s][0], across[s][1]);
#else
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const u32 a[4] = {across[2 * pair][0], across[2 * pair + 1][0], across[2 * pair][1], across[2 * pair + 1][1]};
      multiply_bf16(dphi[pair * OF_DS + s], a, b.x, b.z);
      multiply_bf16(dphi[pair * OF_DS + s], a, b.y, b.w);
    }
#endif
  }
#pragma unroll
  for (int k = 0; HC && k < 4; ++k) dphi[0][k] += part[k];
}

// The sum of two words' lower halves (`shift` 16) or upper halves (0), as bfloat16 numbers.
__device__ __forceinline__ float add_terms(u32 first, u32 second, u32 shift) {
  return high(first << shift) + high(second << shift);
}

// Goes back through the norm of u = h_pre x': d of tokens g, g + 8, rounded or (LOOK_AHEAD) also as two bfloat16 terms,
// and the lane's part of dw. `inverse` is that of token g, and kappa_n.
__device__ __forceinline__ void norm_backward(float (&d)[4], float2& dw, u32 (&terms)[2][2], const float (&x)[N][4],
                                              const float4& pre0, const float4& pre1, const unsigned char* inverse,
                                              const float2& weight) {
  float u[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) u[k] = weighted_sum(k < 2 ? pre0 : pre1, x[0][k], x[1][k], x[2][k], x[3][k]);
  if (LOOK_AHEAD) unpack(u, pack_bf16(u[0], u[1]), pack_bf16(u[2], u[3]));
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float2 norm = *reinterpret_cast<const float2*>(inverse + half * 8 * 16);
    float *own_d = d + 2 * half, *own_u = u + 2 * half;
    dw.x = fmaf(norm.x * own_d[0], own_u[0], dw.x);
    dw.y = fmaf(norm.x * own_d[1], own_u[1], dw.y);
    own_d[0] = fmaf(-norm.y, own_u[0], norm.x * weight.x * own_d[0]);
    own_d[1] = fmaf(-norm.y, own_u[1], norm.x * weight.y * own_d[1]);
    terms[0][half] = pack_bf16(own_d[0], own_d[1]);
    if (LOOK_AHEAD)
      terms[1][half] = pack_bf16(own_d[0] - low(terms[0][half]), own_d[1] - high(terms[0][half]));
    else
      own_d[0] = low(terms[0][half]), own_d[1] = high(terms[0][half]);
  }
}

// FIRST: everything that comes from x' alone. t = h_pre d + kappa x', dphi, dw, and (LOOK_AHEAD) parts of dh_pre in
// place of d. `terms` is d as it was loaded.
__device__ __forceinline__ void compute_known(float (&t)[N][4], float (&dphi)[DPHI][4], float2& dw, const float (&x)[N][4],
                                              const float (&y)[4], float (&d)[4], u32 (&terms)[2][2],
                                              unsigned char* single, const unsigned char* own, const float2& weight,
                                              int lane, int tokens) {
  const int g = lane / 4, q = lane % 4;
  const float4 post0 = load4(own + POST + g * 16), post1 = load4(own + POST + (g + 8) * 16);
  u32 known[N][2], across[N][2];  // x', rounded
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float4 res0 = load4(own + RES + g * RES_PITCH + i * 16);
    const float4 res1 = load4(own + RES + (g + 8) * RES_PITCH + i * 16);
#pragma unroll
    for (int k = 0; k < 4; ++k)
      t[i][k] = mix(k < 2 ? res0 : res1, at(k < 2 ? post0 : post1, i), x[0][k], x[1][k], x[2][k], x[3][k], y[k]);
    known[i][0] = pack_bf16(t[i][0], t[i][1]), known[i][1] = pack_bf16(t[i][2], t[i][3]);
    if (NORM || TERMS == 2) unpack(t[i], known[i][0], known[i][1]);
    across[i][0] = transpose(known[i][0]), across[i][1] = transpose(known[i][1]);
  }
  const float4 pre0 = load4(own + PRE + g * 16), pre1 = load4(own + PRE + (g + 8) * 16);
  if (NORM) norm_backward(d, dw, terms, t, pre0, pre1, own + INVERSE + g * 16, weight);
  __syncwarp();
  // dh_pre: rows are tokens of two streams, columns tokens, and equal tokens are used.
#pragma unroll
  for (int half = 0; LOOK_AHEAD && half < 2; ++half) {
    float sums[2][4] = {};
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const u32 a[4] = {known[2 * pair][half], known[2 * pair + 1][half], known[2 * pair][half],
                        known[2 * pair + 1][half]};
      multiply_bf16(sums[pair], a, terms[0][half], terms[1][half]);
    }
    if (q == g / 2)
      *reinterpret_cast<float4*>(single + half * 8 * PITCH) =
          g % 2 ? make_float4(sums[0][1], sums[0][3], sums[1][1], sums[1][3])
                : make_float4(sums[0][0], sums[0][2], sums[1][0], sums[1][2]);
  }
  add_dphi(dphi, across, own, lane, tokens);
  const auto kappa0 = load_kappa(own, g), kappa1 = load_kappa(own, g + 8);
#pragma unroll
  for (int i = 0; i < N; ++i) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      t[i][k] = fmaf(at(k < 2 ? pre0 : pre1, i), d[k], of_stream(k < 2 ? kappa0 : kappa1, i) * t[i][k]);
  }
}

// The weights of the lane's two columns and their sums dw belong to NORM, `dy_out` to LOOK_AHEAD.
__device__ __forceinline__ void compute_tile(unsigned char* stage, const unsigned char* own, unsigned char* total,
                                             const unsigned char* phi, float (&dphi)[DPHI][4], const float2& weight,
                                             float2& dw, u32* dy_out, int warp, int lane, int tokens) {
  const int g = lane / 4, q = lane % 4;
  // The lane's row for load_matrices and store_matrices. The matrix gives the half of the tokens and one of two
  // streams (or of y and d).
  const int row = lane % 16 * PITCH + lane / 16 * TOKENS * PITCH;
  const int streams_row = row + (warp ^ key(lane / 16, lane)) * 16, single_row = row + (warp ^ key(0, lane)) * 16;
  u32 word[4];
  float x[N][4], t[N][4], y[4], d[4];
  unsigned char* single = stage + D + g * PITCH + (warp ^ key(0, g)) * 16;  // row g of the warp's part of d

#pragma unroll
  for (int i = 0; i < N; i += 2) {
    load_matrices(word, stage + streams_row + X + i * TOKENS * PITCH);
    unpack(x[i], word[0], word[1]);
    unpack(x[i + 1], word[2], word[3]);
    if (FIRST) continue;
    load_matrices(word, stage + streams_row + G + i * TOKENS * PITCH);
    unpack(t[i], word[0], word[1]);
    unpack(t[i + 1], word[2], word[3]);
  }
  load_matrices(word, stage + single_row + Y);
  unpack(y, word[0], word[1]);
  unpack(d, word[2], word[3]);
  u32 terms[2][2] = {{word[2], word[3]}, {0, 0}};
  if (FIRST) {
    compute_known(t, dphi, dw, x, y, d, terms, single, own, weight, lane, tokens);
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      float v[2][4];
      load_matrices(word, stage + streams_row + G + i * TOKENS * PITCH);
      unpack(v[0], word[0], word[1]);
      unpack(v[1], word[2], word[3]);
#pragma unroll
      for (int k = 0; k < 4; ++k) t[i][k] += v[0][k], t[i + 1][k] += v[1][k];
    }
  }

  // t += ds phi^T. Element k of a product's inner index is column 8 s + 2 k for k < 4, else 8 s + 2 (k - 4) + 1.
#pragma unroll
  for (int s = 0; s < OF_DS; ++s) {
    const float4 a = load4(own + DS + (s * 32 + lane) * 16);
#if HC
    const float2 p = *reinterpret_cast<const float2*>(phi);
    multiply_tf32(t[s], a.x, a.y, a.z, a.w, p.x, p.y);
#else
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      const float4 p = reinterpret_cast<const float4*>(phi)[(s * 2 + i / 2) * THREADS];
      multiply_tf32(t[i], a.x, a.y, a.z, a.w, p.x, p.y);
      multiply_tf32(t[i + 1], a.x, a.y, a.z, a.w, p.z, p.w);
    }
#endif
  }

  const auto kappa0 = load_kappa(own, g), kappa1 = load_kappa(own, g + 8);
  const float4 pre0 = load4(own + PRE + g * 16), pre1 = load4(own + PRE + (g + 8) * 16);
  float4 post0, post1;
  float dx[N][4] = {}, dy[4] = {};
  if (NORM && !FIRST) norm_backward(d, dw, terms, x, pre0, pre1, own + INVERSE + g * 16, weight);
  if (MIX) post0 = load4(own + POST + g * 16), post1 = load4(own + POST + (g + 8) * 16);
  u32 across[N][2];  // x' with tokens along words: column g, tokens 2q, 2q + 1 (and + 8)
#pragma unroll
  for (int i = 0; i < N; ++i) {
    float4 res0, res1;
    float mixed[4];
    if (MIX) {
      res0 = load4(own + RES + g * RES_PITCH + i * 16);
      res1 = load4(own + RES + (g + 8) * RES_PITCH + i * 16);
    }
    if (!FIRST) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float post = MIX ? at(k < 2 ? post0 : post1, i) : 0;
        mixed[k] = MIX ? mix(k < 2 ? res0 : res1, post, x[0][k], x[1][k], x[2][k], x[3][k], y[k]) : x[i][k];
      }
      const u32 rounded[2] = {pack_bf16(mixed[0], mixed[1]), pack_bf16(mixed[2], mixed[3])};
      if (MIX && TERMS == 2) unpack(mixed, rounded[0], rounded[1]);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        t[i][k] = fmaf(at(k < 2 ? pre0 : pre1, i), d[k], t[i][k]);
        t[i][k] = fmaf(of_stream(k < 2 ? kappa0 : kappa1, i), mixed[k], t[i][k]);
      }
      across[i][0] = transpose(rounded[0]);
      across[i][1] = transpose(rounded[1]);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float4& res = k < 2 ? res0 : res1;
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
  }

  if (!FIRST) add_dphi(dphi, across, own, lane, tokens);
  __syncwarp();
#pragma unroll
  for (int i = 0; i < N; i += 2) {
    const int to = streams_row + i * TOKENS * PITCH;
    store_matrices(stage + G + to, pack_bf16(dx[i][0], dx[i][1]), pack_bf16(dx[i][2], dx[i][3]),
                   pack_bf16(dx[i + 1][0], dx[i + 1][1]), pack_bf16(dx[i + 1][2], dx[i + 1][3]));
    if (MIX) {
      u32 term[4] = {pack_bf16(t[i][0], t[i][1]), pack_bf16(t[i][2], t[i][3]),
                     pack_bf16(t[i + 1][0], t[i + 1][1]), pack_bf16(t[i + 1][2], t[i + 1][3])};
      store_matrices(total + to, term[0], term[1], term[2], term[3]);
      if (TERMS == 2) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float* from = t[i + k / 2] + k % 2 * 2;
          term[k] = pack_bf16(from[0] - low(term[k]), from[1] - high(term[k]));
        }
        store_matrices(total + STREAMS + to, term[0], term[1], term[2], term[3]);
      }
    }
  }
  if (LOOK_AHEAD) {
    if (g < tokens) dy_out[0] = pack_bf16(dy[0], dy[1]);
    if (g + 8 < tokens) dy_out[8 * C / 2] = pack_bf16(dy[2], dy[3]);
  } else if (MIX) {
    unsigned char* to = single + q * 4;
    *reinterpret_cast<u32*>(to) = pack_bf16(dy[0], dy[1]);
    *reinterpret_cast<u32*>(to + 8 * PITCH) = pack_bf16(dy[2], dy[3]);
  }
}

}  // namespace

// Grid (C / 64, splits): program (slab, split) walks over tiles split, split + splits, ...
// x, g, dx [T, 4 C]; y, d, dy [T, C]; post, pre [T, 4]; res [T, 16]; phi [C / 64, 8, 2, 3, 32, 8] (`phi_fragments`); ds [tiles, 3, 32, 4] and
// ds_pairs [tiles, 3, 32, 8] as the lanes want them; kappa [T]; sums [C / 64, T, 20 or 24]; dphi [splits, 4 C, 24].
// HC: phi is theta [C / 64, 8, 32, 4] (`theta_fragments`), dphi [splits, 6, C], kappa [T, 4], and ds has 4 in place of 3. kappa_pre as kappa, but not with LOOK_AHEAD.
// NORM: inverse and kappa_n [T, 4], weight [C], dw [splits, C]. With LOOK_AHEAD they are there without it, too.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    KERNEL(const bf16* x, const bf16* y, const float* post, const float* res, const bf16* g, const bf16* d,
           const float* pre, const bf16* phi, const float* ds, const bf16* ds_pairs, const float* kappa,
#if !LOOK_AHEAD
           const float* kappa_pre,
#endif
#if NORM || LOOK_AHEAD
           const float* inverse, const float* weights, int T, bf16* dx, bf16* dy, float* sums, float* dphi_out,
           float* dw_out) {
#else
           int T, bf16* dx, bf16* dy, float* sums, float* dphi_out) {
  const float *inverse = nullptr, *weights = nullptr;
  float* dw_out = nullptr;
#endif
#if LOOK_AHEAD
  const float* kappa_pre = nullptr;
#endif
  SHARED_MEMORY(shared);
  const Arrays a = {x, y, post, res, g, d, pre, ds, ds_pairs, kappa, kappa_pre, inverse};
  const u32 thread = threadIdx.x;
  const int warp = thread / 32, lane = thread % 32;
  const int slab = blockIdx.x, split = blockIdx.y, apart = gridDim.y * TOKENS;
  const Share share(thread, slab);
  const Coefficients coefficients(a, thread);
  int first = split * TOKENS;
  if (first < T) load_tile(shared, shared + OWNS, a, share, coefficients, first, T);
  copy_async_commit();
  // phi as the right operand of ds phi^T, in a place that this thread alone uses. It comes as forward.cu reads it; a high
  // and a low term add up to the TF32 number. The thread has columns 2q, 2q + 1 of phi at its column of the streams.
  unsigned char* own_phi = shared + PHI + thread * (HC ? 8 : 16);
  const u32 piece = slab * 8 + warp, first_lane = lane % 4 * 8 + lane / 8;
  const u32 half = lane & 4 ? 0 : 16;
#if HC
  const uint2* row = reinterpret_cast<const uint2*>(phi) + piece * 32 + first_lane;
  *reinterpret_cast<float2*>(own_phi) =
      make_float2(add_terms(row[0].x, row[0].y, half), add_terms(row[4].x, row[4].y, half));
#else
  for (int k = 0; k < 6; ++k) {  // two streams, then 8 columns of phi
    const uint4* row = reinterpret_cast<const uint4*>(phi) + (piece * 6 + k) * 32 + first_lane;
    const uint4 a = row[0], b = row[4];  // whole: a load of parts gets a pragma that older versions of PTX do not have
    reinterpret_cast<float4*>(own_phi)[(k % 3 * 2 + k / 3) * THREADS] =
        make_float4(add_terms(a.x, a.z, half), add_terms(b.x, b.z, half), add_terms(a.y, a.w, half),
                    add_terms(b.y, b.w, half));
  }
#endif
  float dphi[DPHI][4] = {};
  const int own_column = slab * COLUMNS + warp * 8 + lane % 4 * 2;  // the lane's first column in y, d, dy
  float2 weight = {}, dw = {};
  if (NORM) weight = *reinterpret_cast<const float2*>(weights + own_column);

  // Between two barriers one tile is filled, one is computed, and the tile before is written out. With two terms a
  // second barrier keeps t of the tile before until all warps have read it.
  int current = 0, parity = 0;
  for (; first - apart < T; first += apart) {
    copy_async_wait<0>();
    __syncthreads();
    if (first + apart < T)
      load_tile(shared + (current + 1) % STAGES * STAGE, shared + OWNS + (parity ^ 1) * OWN, a, share, coefficients,
                first + apart, T);
    copy_async_commit();
    __syncwarp();
    if (first >= apart) {
      const unsigned char* before = shared + (current + STAGES - 1) % STAGES * STAGE;
      Sums products;
      if (MIX) {
        products.load_total(shared + TOTAL + (TERMS == 1 ? (parity ^ 1) * STREAMS : 0), warp, lane);
        if (TERMS == 2) __syncthreads();
        products.load_update(before, warp, lane);
      }
      store_tile(before, share, dx, dy, first - apart, T);
      if (LOOK_AHEAD) store_pre(before, sums, lane, slab * T + first - apart, T - first + apart);
      __syncwarp();
      if (MIX) products.store(sums, warp, lane, slab * T + first - apart, T - first + apart);
    }
    if (first >= T) break;
    u32* dy_out = reinterpret_cast<u32*>(dy) + (static_cast<u32>(first + lane / 4) * C + own_column) / 2;
    compute_tile(shared + current * STAGE, shared + OWNS + parity * OWN,
                 shared + TOTAL + (TERMS == 1 ? parity * STREAMS : 0), own_phi, dphi, weight, dw, dy_out, warp, lane,
                 T - first);
    current = (current + 1) % STAGES;
    parity ^= 1;
  }

#if HC
  if (lane < 6 * 4)
    *reinterpret_cast<float2*>(dphi_out + (static_cast<long long>(split) * 6 + lane / 4) * C + own_column) =
        make_float2(dphi[0][0] + dphi[0][2], dphi[0][1] + dphi[0][3]);
#else
  const u32 column = slab * COLUMNS + warp * 8 + lane / 4;  // made here: through the loop it would cost a register
  float* out = dphi_out + static_cast<long long>(split) * K * M;
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
#pragma unroll
    for (int s = 0; s < 3; ++s) {
      const float* sum = dphi[pair * OF_DS + s];
      float* row = out + (static_cast<long long>(2 * pair) * C + column) * M + 8 * s + thread % 4 * 2;
      *reinterpret_cast<float2*>(row) = make_float2(sum[0], sum[1]);
      *reinterpret_cast<float2*>(row + C * M) = make_float2(sum[2], sum[3]);
    }
  }
#endif
  if (NORM) {
#pragma unroll
    for (int bit = 4; bit < 32; bit *= 2) {
      dw.x += __shfl_sync(0xffffffffu, dw.x, lane ^ bit);
      dw.y += __shfl_sync(0xffffffffu, dw.y, lane ^ bit);
    }
    // Made here: own_column costs a register through the loop, which LOOK_AHEAD needs there anyway.
    const int column = LOOK_AHEAD ? own_column : slab * COLUMNS + warp * 8 + lane * 2;
    if (lane < 4) *reinterpret_cast<float2*>(dw_out + static_cast<long long>(split) * C + column) = dw;
  }
}
