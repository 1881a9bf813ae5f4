// The whole forward of a boundary in one pass over rows of up to 512 columns a stream (n = 4, bfloat16):
//
//   x' = h_res x + h_post y,   s = x' phi,   r,   h_pre, h_post, h_res,   u = h_pre x' or its RMSNorm
//
// It reads x (4C) and y and writes x' (4C) and u: 10C, where forward.cu and F_pre move 14C. A program has tiles of 16
// tokens with their whole rows in registers: a warp has 32 columns of each stream, a lane (4 g + q) 8 columns of tokens
// g and g + 8. phi stays in shared memory. x and y of the next tile are loaded as soon as x' is made. One warp does
// Sinkhorn-Knopp, one thread a token, while the others go on with the next tile or wait for its rows. A warp more for
// it would leave a thread 96 registers, because registers are given to warps in fours; 128 are needed.
//
// The roundings are those of forward.cu: x' is rounded before it is multiplied, phi comes as exact bfloat16 terms. A
// lane's 8 columns are two steps of 4 in the products' inner index, for which phi is laid out anew. Tensor cores
// truncate when they accumulate: at most 16 products in turn, then warps are added in float32.
//
// Constants: C, HC (see forward.cu), LOGITS (-1, or how many logits are in place of h_res), NORM (0 or 1),
// NUM_ITERATIONS, and the bits of float32 numbers NORM_EPS, INPUT_NORM_EPS, SINKHORN_EPS, PRE_EPS. PROGRAMS of a
// multiprocessor.
#include "boundary/tile.cuh"
#include "boundary/rows_mappings.cuh"

namespace {

constexpr bool SINKHORN = !HC && LOGITS < 0;
constexpr int OF_SQUARES = HC ? N : 1;        // sums of squares of a token
constexpr int OF_S = HC || LOGITS < 0 ? M : 2 * N + LOGITS;
static_assert(C == 32 * WARPS && WARPS % 2 == 0, "a warp has 32 columns of a stream");

// Shared memory, in bytes: phi, partial sums of every warp, h_res and h_post of two tiles, h_pre,
// bias and alpha of the columns of s.
constexpr int PHI_BYTES = WARPS * (HC ? 2 : N * 2 * 3) * 32 * 16;
// A token's numbers in the partial sums of a warp: s, sums of squares of x', of u, and unused ones, so that what a warp
// writes at once (8 columns of 4 tokens) lies in all banks. Logits of h_res replace s of the first warp.
constexpr int PARTS = HC ? 36 : 28, OF_U = M + OF_SQUARES;
constexpr int COEFFICIENTS_PITCH = 5;         // float4: h_res, h_post; 8 tokens lie in all banks
constexpr int S = PHI_BYTES, COEFFICIENTS = S + WARPS * TOKENS * PARTS * 4;
constexpr int PRE = COEFFICIENTS + 2 * TOKENS * COEFFICIENTS_PITCH * 16, GATES = PRE + TOKENS * 16;
static_assert(SHARED_BYTES == GATES + M * 8, "rows_launches.py counts otherwise");

struct Arguments {
  const bf16 *x, *y;
  const float *post, *res;
  const bf16* phi;
  const float *bias, *alpha, *weight;
  int T;
  bf16 *mixed, *layer_input;
  float *new_pre, *new_post, *new_res, *s, *r;
};

__device__ __forceinline__ u32& word(uint4& v, int k) { return k == 0 ? v.x : k == 1 ? v.y : k == 2 ? v.z : v.w; }

// Eight columns of a lane's tokens g and g + 8.
struct Streams {
  uint4 x[2][N];
};
struct Pending {
  uint4 y[2];
};

__device__ __forceinline__ u32 row_of(int first, int half, int lane, int T) {
  return min(first + half * 8 + lane / 4, T - 1);
}

__device__ __forceinline__ void load(Streams& to, const Arguments& a, int first, u32 column, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const u32 row = row_of(first, half, lane, a.T);
#pragma unroll
    for (int i = 0; i < N; ++i) to.x[half][i] = *chunk(a.x, (row * N + i) * (C / 8) + column);
  }
}
__device__ __forceinline__ void load(Pending& to, const Arguments& a, int first, u32 column, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) to.y[half] = *chunk(a.y, row_of(first, half, lane, a.T) * (C / 8) + column);
}

struct Tile {
  u32 a[4];
  __device__ __forceinline__ explicit Tile(const uint4& v) : a{v.x, v.y, v.z, v.w} {}
};

// The place of a lane's 16 bytes of phi, in the first half of its 8 columns; in the second half ^ 1. So neither reads
// nor `lay_out_phi` meet in a bank.
__device__ __forceinline__ int phi_place(int lane) { return lane ^ lane / 4 & 2; }

// x' in place of x, and to memory.
__device__ __forceinline__ void mix_rows(Streams& v, Pending& y, const Arguments& a, const float4* coefficients, int first,
                                         u32 column, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float4* own = coefficients + (half * 8 + lane / 4) * COEFFICIENTS_PITCH;
    float in[N + 1][8];
#pragma unroll
    for (int j = 0; j <= N; ++j)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const u32 pair = word(j < N ? v.x[half][j] : y.y[half], k);
        in[j][2 * k] = low(pair), in[j][2 * k + 1] = high(pair);
      }
    const int row = first + half * 8 + lane / 4;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float4 res = own[i];
      const float post = reinterpret_cast<const float*>(own + N)[i];
#pragma unroll
      for (int k = 0; k < 4; ++k)
        word(v.x[half][i], k) =
            pack_bf16(mix(res, post, in[0][2 * k], in[1][2 * k], in[2][2 * k], in[3][2 * k], in[4][2 * k]),
                      mix(res, post, in[0][2 * k + 1], in[1][2 * k + 1], in[2][2 * k + 1], in[3][2 * k + 1], in[4][2 * k + 1]));
      if (row < a.T) *chunk(a.mixed, (static_cast<u32>(row) * N + i) * (C / 8) + column) = v.x[half][i];
    }
  }
}

// The sums of the warp's 32 columns, to shared memory. phi^T is the left operand of the products, so that a lane's words
// of x' are right ones as they lie in memory. Its tiles: high terms of s 0-15, low ones, both of s 16-23 (HC: of theta).
__device__ __forceinline__ void multiply(Streams& v, unsigned char* shared, int warp, int lane) {
  const int g = lane / 4, q = lane % 4;
  float* parts = reinterpret_cast<float*>(shared + S) + warp * TOKENS * PARTS;
  const uint4* own_phi = reinterpret_cast<const uint4*>(shared) + warp * (PHI_BYTES / 16 / WARPS);
  const int place = phi_place(lane);
#if HC
#pragma unroll
  for (int i = 0; i < N; ++i) {
    float s[2][4] = {};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Tile tile(own_phi[h * 32 + (place ^ h)]);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        multiply_bf16(s[half], tile.a, word(v.x[half][i], 2 * h), word(v.x[half][i], 2 * h + 1));
    }
    if (g < 2 + N) {
#pragma unroll
      for (int k = 0; k < 4; ++k) parts[(k / 2 * 8 + 2 * q + k % 2) * PARTS + i * (2 + N) + g] = s[k / 2][k % 2] + s[k / 2][k % 2 + 2];
    }
  }
#else
  float s[2][4] = {}, last[2][4] = {};
#pragma unroll
  for (int i = 0; i < N; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int t = 0; t < 3; ++t) {
        const Tile tile(own_phi[((i / 2 * 3 + t) * 4 + i % 2 * 2 + h) * 32 + (place ^ h)]);
#pragma unroll
        for (int half = 0; half < 2; ++half)
          multiply_bf16(t < 2 ? s[half] : last[half], tile.a, word(v.x[half][i], 2 * h), word(v.x[half][i], 2 * h + 1));
      }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    float* to = parts + (k / 2 * 8 + 2 * q + k % 2) * PARTS + g;
    to[0] = s[k / 2][k % 2], to[8] = s[k / 2][k % 2 + 2], to[16] = last[k / 2][k % 2] + last[k / 2][k % 2 + 2];
  }
#endif
  // A quad of words is a left operand of 8 tokens too: words 0 and 2 of token g above words 1 and 3.
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float even[4] = {}, odd[4] = {};
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Tile tile(v.x[half][i]);
      multiply_bf16(even, tile.a, tile.a[0], tile.a[2]);
      multiply_bf16(odd, tile.a, tile.a[1], tile.a[3]);
      if (!HC && i < N - 1) continue;
      if (q == g / 2) parts[(half * 8 + g) * PARTS + M + (HC ? i : 0)] = g % 2 ? even[1] + odd[3] : even[0] + odd[2];
#pragma unroll
      for (int k = 0; k < 4; ++k) even[k] = odd[k] = 0;
    }
  }
}

// bias and alpha of the columns of s, to shared memory.
__device__ __forceinline__ void copy_gates(unsigned char* shared, const Arguments& a) {
  const int lane = threadIdx.x, row = lane % (2 + N), column = HC ? row * N + lane / (2 + N) : lane;
  if (lane < OF_S)
    reinterpret_cast<float2*>(shared + GATES)[lane] =
        make_float2(a.bias[column], a.alpha[HC ? min(row, 2) : min(lane / N, 2)]);
}

// Adds up the sums of one token over the warps and makes its mappings, except for Sinkhorn-Knopp.
__device__ __forceinline__ void finish_token(unsigned char* shared, const Arguments& a, int token, int first, int lane) {
  const float2 gate_of = reinterpret_cast<const float2*>(shared + GATES)[min(lane, OF_S - 1)];
  const bool is_s = lane < M;
  const float* from = reinterpret_cast<const float*>(shared + S) + token * PARTS + min(lane, M + OF_SQUARES - 1);
  float sum = 0;
#pragma unroll
  for (int k = 0; k < WARPS; ++k) sum += from[k * TOKENS * PARTS];
  const float squares = __shfl_sync(~0u, sum, HC ? M + lane / 6 % N : M);
  const float r = sqrtf(squares * (1.0f / (HC ? C : N * C)) + float_of(NORM_EPS)), normed = sum / r;
  const bool inside = first + token < a.T;
  const u32 row = first + token;
  float* pre = reinterpret_cast<float*>(shared + PRE) + token * N;
  if (HC) {
    const int j = lane / 6, c = lane % 6;
    const float h = tanhf(normed) * gate_of.y + gate_of.x;
    if (is_s && c == 0) pre[j] = h;
    if (is_s && inside) {
      float* to = c == 0 ? a.new_pre + row * N + j : c == 1 ? a.new_post + row * N + j
                                                            : a.new_res + (row * N + c - 2) * N + j;
      *to = h;
      if (c == 0) a.r[row * N + j] = r;
    }
  } else {
    const float h = normed * gate_of.y + gate_of.x, gate = sigmoid(h);
    const float own_pre = gate + float_of(PRE_EPS);
    if (lane < N) pre[lane] = own_pre;
    if (SINKHORN && is_s && lane >= 2 * N) reinterpret_cast<float*>(shared + S)[token * PARTS + lane] = h;
    if (inside) {
      if (lane < N) a.new_pre[row * N + lane] = own_pre;
      else if (lane < 2 * N) a.new_post[row * N + lane - N] = 2 * gate;
      else if (!SINKHORN && lane < OF_S) a.new_res[row * static_cast<u32>(LOGITS) + lane - 2 * N] = h;
      if (lane == 0) a.r[row] = r;
    }
  }
  if (inside && lane < OF_S) a.s[row * OF_S + lane] = sum;
}

// u of a lane's columns, of x'.
struct LayerInput {
  float u[2][8];

  __device__ __forceinline__ void make(Streams& v, const unsigned char* shared, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float4 pre = reinterpret_cast<const float4*>(shared + PRE)[half * 8 + lane / 4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        u32 of[N];
#pragma unroll
        for (int i = 0; i < N; ++i) of[i] = word(v.x[half][i], k);
        u[half][2 * k] = weighted_sum(pre, low(of[0]), low(of[1]), low(of[2]), low(of[3]));
        u[half][2 * k + 1] = weighted_sum(pre, high(of[0]), high(of[1]), high(of[2]), high(of[3]));
      }
    }
  }
  __device__ __forceinline__ void store_squares(unsigned char* shared, int warp, int lane) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = 0;
#pragma unroll
      for (int k = 0; k < 8; ++k) sum = fmaf(u[half][k], u[half][k], sum);
      sum += __shfl_sync(~0u, sum, lane ^ 1);
      sum += __shfl_sync(~0u, sum, lane ^ 2);
      if (lane % 4 == 0)
        reinterpret_cast<float*>(shared + S)[(warp * TOKENS + half * 8 + lane / 4) * PARTS + OF_U] = sum;
    }
  }
  __device__ __forceinline__ void norm(const unsigned char* shared, const float4 (&weight)[2], int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* from = reinterpret_cast<const float*>(shared + S) + (half * 8 + lane / 4) * PARTS + OF_U;
      float sum = 0;
#pragma unroll
      for (int k = 0; k < WARPS; ++k) sum += from[k * TOKENS * PARTS];
      const float inverse = rsqrtf(sum * (1.0f / C) + float_of(INPUT_NORM_EPS));
#pragma unroll
      for (int k = 0; k < 8; ++k) u[half][k] = u[half][k] * inverse * at(weight[k / 4], k % 4);
    }
  }
  __device__ __forceinline__ void store(const Arguments& a, int first, u32 column, int lane) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + half * 8 + lane / 4;
      const float(&v)[8] = u[half];
      const uint4 packed = {pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7])};
      if (row < a.T) *chunk(a.layer_input, static_cast<u32>(row) * (C / 8) + column) = packed;
    }
  }
};

// phi from the order of `phi_fragments` or `theta_fragments`, whose lanes have two columns of each 8, to the order of
// `multiply`, whose lanes have 8 columns: by warp, two streams, tile, stream, half of the 8 columns and lane 16 bytes
// (HC: by warp, half and lane).
__device__ __forceinline__ void lay_out_phi(unsigned char* shared, const bf16* phi) {
  const int lane = threadIdx.x % 32, g = lane / 4, h = lane / 2 % 2, e = lane % 2;
#if HC
  for (int part = threadIdx.x; part < WARPS * 64; part += THREADS) {
    const int half = part / 32 % 2;
    reinterpret_cast<uint4*>(shared)[part / 32 * 32 + (phi_place(lane) ^ half)] =
        *chunk(phi, (part / 64 * 4 + lane % 4) * 16 + g * 2 + half);
  }
#else
#pragma unroll 2
  for (int part = threadIdx.x / 32; part < WARPS * 8; part += WARPS) {
    const int q = part / 2 % 4;  // of the lane that will have it
    uint4 v[3];                  // 8 columns of phi each: high terms of two streams, low ones
#pragma unroll
    for (int m = 0; m < 3; ++m) v[m] = *chunk(phi, (part * 3 + m) * 32 + lane);
    uint2* to = reinterpret_cast<uint2*>(shared) + (part / 8 * 2 + part % 2) * (3 * 4 * 64) + h * 64 +
                (phi_place(4 * g + q) ^ h) * 2 + e;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      to[(0 + i * 2) * 64] = i ? uint2{v[0].y, v[1].y} : uint2{v[0].x, v[1].x};
      to[(4 + i * 2) * 64] = i ? uint2{v[0].w, v[1].w} : uint2{v[0].z, v[1].z};
      to[(8 + i * 2) * 64] = i ? uint2{v[2].y, v[2].w} : uint2{v[2].x, v[2].z};
    }
  }
#endif
}

// h_res and h_post of a tile, by one warp.
__device__ __forceinline__ void copy_coefficients(unsigned char* to, const Arguments& a, int first, int lane) {
#pragma unroll
  for (int k = 0; k < (TOKENS * 5 + 31) / 32; ++k) {
    const int part = k * 32 + lane, token = part / 5, i = part % 5;
    const u32 row = min(first + token, a.T - 1);
    if (part < TOKENS * 5)
      copy_async_16(to + (token * COEFFICIENTS_PITCH + i) * 16,
                    i < N ? chunk(a.res, row * N + i) : chunk(a.post, row), true);
  }
  copy_async_commit();
}

__device__ __forceinline__ void project_tile(const unsigned char* shared, const Arguments& a, int first, int lane) {
  if (lane >= TOKENS || first + lane >= a.T) return;
  Matrix matrix;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float4 v = reinterpret_cast<const float4*>(shared + S + lane * PARTS * 4)[2 + i];
    matrix.v[i][0] = v.x, matrix.v[i][1] = v.y, matrix.v[i][2] = v.z, matrix.v[i][3] = v.w;
  }
  matrix.project(NUM_ITERATIONS, float_of(SINKHORN_EPS));
  float4* to = reinterpret_cast<float4*>(a.new_res) + static_cast<u32>(first + lane) * N;
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = {matrix.v[i][0], matrix.v[i][1], matrix.v[i][2], matrix.v[i][3]};
}

__device__ __forceinline__ int first_token(int item, int tiles) { return (tiles - 1 - item) * TOKENS; }

__device__ __forceinline__ unsigned char* coefficients_of(unsigned char* shared, int parity) {
  return shared + COEFFICIENTS + parity * TOKENS * COEFFICIENTS_PITCH * 16;
}

__device__ __forceinline__ void run(const Arguments& a) {
  SHARED_MEMORY(shared);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = threadIdx.x % 32;
  const int tiles = (a.T + TOKENS - 1) / TOKENS, step = gridDim.x;
  const u32 column = warp * 4 + lane % 4;  // in chunks of 8
  Streams next;
  Pending y;
  int item = blockIdx.x, parity = 0;
  load(next, a, first_token(item, tiles), column, lane);
  load(y, a, first_token(item, tiles), column, lane);
  if (warp == 0) copy_coefficients(coefficients_of(shared, 0), a, first_token(item, tiles), lane);
  lay_out_phi(shared, a.phi);
  copy_gates(shared, a);
  if (warp == 0) copy_async_wait<0>();
  __syncthreads();
  if (warp == 0 && item + step < tiles)
    copy_coefficients(coefficients_of(shared, 1), a, first_token(item + step, tiles), lane);
  for (; item < tiles; item += step, parity ^= 1) {
    const int first = first_token(item, tiles);
    Streams v = next;
    mix_rows(v, y, a, reinterpret_cast<const float4*>(coefficients_of(shared, parity)), first, column, lane);
    const bool more = item + step < tiles;
    if (more) {
      load(next, a, first_token(item + step, tiles), column, lane);
      load(y, a, first_token(item + step, tiles), column, lane);
    }
    multiply(v, shared, warp, opaque(lane));
    if (warp == 0) copy_async_wait<0>();
    __syncthreads();
    if (warp == 0 && item + 2 * step < tiles)
      copy_coefficients(coefficients_of(shared, parity), a, first_token(item + 2 * step, tiles), lane);
#pragma unroll 1
    for (int token = warp; token < TOKENS; token += WARPS) finish_token(shared, a, token, first, opaque(lane));
    __syncthreads();
    LayerInput layer_input;
    const int late = opaque(lane);
    layer_input.make(v, shared, late);
    if (NORM) {
      layer_input.store_squares(shared, warp, late);
      const float4 weight[2] = {reinterpret_cast<const float4*>(a.weight)[2 * column],
                                reinterpret_cast<const float4*>(a.weight)[2 * column + 1]};
      __syncthreads();
      layer_input.norm(shared, weight, late);
    }
    layer_input.store(a, first, column, late);
    // The other warps go on to the next tile or wait for its rows.
    if (SINKHORN && warp == 0) project_tile(shared, a, first, late);
  }
}

}  // namespace

#if HC
#define KERNEL mhc_hc_boundary_rows_forward
#else
#define KERNEL mhc_boundary_rows_forward
#endif
#if NORM
#define WEIGHT const float* weight,
#else
#define WEIGHT
constexpr const float* weight = nullptr;
#endif
// At most as many programs as tiles. x, mixed = x' [T, 4 C]; y, layer_input [T, C]; post, new_pre, new_post [T, 4]; res, new_res [T, 16];
// phi of `phi_fragments`, with HC `theta_fragments`; weight [C]; s [T, 24] and r [T], with HC [T, 4, 6] and [T, 4].
// With LOGITS new_res is [T, LOGITS] and s [T, 8 + LOGITS].
extern "C" __global__ void __launch_bounds__(THREADS, PROGRAMS)
    KERNEL(const bf16* x, const bf16* y, const float* post, const float* res, const bf16* phi, const float* bias,
           const float* alpha, WEIGHT int T, bf16* mixed, bf16* layer_input, float* new_pre,
           float* new_post, float* new_res, float* s, float* r) {
  run({x, y, post, res, phi, bias, alpha, weight, T, mixed, layer_input, new_pre, new_post, new_res, s, r});
}
