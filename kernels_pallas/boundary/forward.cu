// Does the write of one sublayer and the projection of the next in one pass over the streams (n = 4, bfloat16):
//
//   x' = h_res x + h_post y,   s = x' phi,   and the sum of squares of x'
//
// It reads x (4C) and y and writes x' (4C): 9C instead of the 13C of two kernels. A warp owns 16 tokens and walks along
// their rows, 64 columns of each stream a step, so that s stays in registers. The eight warps of a program share phi.
// Programs that share a row (splits) run side by side and take turns along it, because memory is faster if rows are
// read in pieces longer than 128 bytes. Programs stay: they load the next tile's first step while they finish a tile.
//
// x' is rounded to bfloat16 before it is multiplied. phi comes as exact bfloat16 terms, high + low, in the order of the
// lanes. The sum of squares is the diagonal of a product of x' with itself, 16 tokens x 8 tokens.
//
// With LOOK_AHEAD the layer input u = h_pre x' is part of the pass, because h_pre is known before: it takes the place
// of y in shared memory and in memory costs C more.
//
// With HC (Hyper-Connections) each stream has its own projection and norm, and all have the same theta [6, C]:
// s[j] = x'_j theta^T and the sum of squares of x'_j. One product a stream is enough: x'_j stands in it twice, once for
// the high terms of theta and once for the low ones.
//
// Constants: C, SPLITS (divides C / 64), LOOK_AHEAD, HC (0 or 1, not both).
#include "boundary/tile.cuh"

namespace {

constexpr int STEPS = C / COLUMNS / SPLITS;   // of a tile

// A warp's tile in shared memory: rows of x (then x') by stream and token, then y (then u). The 16-byte chunks of
// a row are permuted, chunk c to place c ^ key, so that 8 tokens of a stream do not meet in one bank.
constexpr int STREAM = TOKENS * PITCH, Y = N * STREAM, TILE = Y + STREAM;
constexpr int PHI = 2 * WARPS * TILE;         // by 8 columns, two streams, 8 of s and lane: 16 bytes (HC: by 8 columns and lane)
#if HC
typedef uint2 Phi;                            // of a lane
constexpr int PHI_TILE = COLUMNS / 8 * 32 * 8;
#else
typedef uint4 Phi;
constexpr int PHI_TILE = COLUMNS * N * M * 4;
#endif
// Tiles of 8 columns of s, and products whose diagonals are sums of squares.
constexpr int OF_S = HC ? N : 3, OF_SQUARES = HC ? N : 2;
static_assert(SHARED_BYTES == PHI + 2 * PHI_TILE, "cuda_launches.py counts otherwise");

__device__ __forceinline__ int key(int token) { return token % 8; }

// One item of a program's work: a tile of 128 tokens and a range of columns.
struct Place {
  int first, column;  // token; column in chunks of 8

  __device__ __forceinline__ Place(int item, int step, int T) {
    const int tiles = (T + WARPS * TOKENS - 1) / (WARPS * TOKENS);
    // From the last tokens to the first, because F_pre comes next and begins with the first.
    first = (tiles - 1 - item / SPLITS) * WARPS * TOKENS + static_cast<int>(threadIdx.x) / 32 * TOKENS;
    column = (step * SPLITS + item % SPLITS) * (COLUMNS / 8);
  }
};

__device__ __forceinline__ void load_step(unsigned char* tile, unsigned char* phi_tile, const bf16* x, const bf16* y,
                                          const bf16* phi, Place at, int lane, int T) {
#pragma unroll
  for (int k = 0; k < TOKENS / 4; ++k) {
    const int token = k * 4 + lane / 8;
    const bool inside = at.first + token < T;
    unsigned char* to = tile + token * PITCH + (lane % 8 ^ key(token)) * 16;
    const u32 row = at.first + token;
#pragma unroll
    for (int i = 0; i < N; ++i)
      copy_async_16(to + i * STREAM, chunk(x, (row * N + i) * (C / 8) + at.column + lane % 8), inside);
    copy_async_16(to + Y, chunk(y, row * (C / 8) + at.column + lane % 8), inside);
  }
#pragma unroll
  for (int k = 0; k < (PHI_TILE / 16 + THREADS - 1) / THREADS; ++k) {
    const u32 part = k * THREADS + threadIdx.x;
    if (HC && part >= PHI_TILE / 16) continue;  // whole warps
    copy_async_16(phi_tile + part * 16, chunk(phi, at.column / 8 * (PHI_TILE / 16) + part), true);
  }
}

// h_res, h_post and (LOOK_AHEAD) h_pre of the lane's two tokens.
struct Mappings {
  float4 res[2][N], post[2], pre[2];

  __device__ __forceinline__ void load(const float* all_res, const float* all_post, const float* all_pre, int first,
                                       int lane, int T) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = min(first + half * 8 + lane / 4, T - 1);
      post[half] = reinterpret_cast<const float4*>(all_post)[token];
      if (LOOK_AHEAD) pre[half] = reinterpret_cast<const float4*>(all_pre)[token];
#pragma unroll
      for (int i = 0; i < N; ++i) res[half][i] = reinterpret_cast<const float4*>(all_res)[token * N + i];
    }
  }
  // Element k of stream i of x'.
  __device__ __forceinline__ float mix(const float (&x)[N][4], const float (&y)[4], int i, int k) const {
    return ::mix(res[k / 2][i], at(post[k / 2], i), x[0][k], x[1][k], x[2][k], x[3][k], y[k]);
  }
};

// The sums of a warp over the columns: s, and x' x'^T of tokens 0-7 and 8-15. Only the diagonal of x' x'^T is used.
// With HC both are those of each stream; its products x'_j x'_j^T have tokens 0-7 above tokens 8-15.
struct Sums {
  float s[OF_S][4], squares[OF_SQUARES][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int m = 0; m < OF_S; ++m) s[m][k] = 0;
#pragma unroll
      for (int m = 0; m < OF_SQUARES; ++m) squares[m][k] = 0;
    }
  }
  __device__ __forceinline__ void add(const Sums& other) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int m = 0; m < OF_S; ++m) s[m][k] += other.s[m][k];
#pragma unroll
      for (int m = 0; m < OF_SQUARES; ++m) squares[m][k] += other.squares[m][k];
    }
  }
  __device__ __forceinline__ void store(float* parts, int first, int lane, int T) const {
    const int g = lane / 4, q = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (first + half * 8 + g >= T) continue;
      float* to = parts + static_cast<long long>(first + half * 8 + g) * PARTS;
#pragma unroll
      for (int m = 0; m < OF_S; ++m) {
        if (!HC || q < 3)
          *reinterpret_cast<float2*>(to + m * 8 + q * 2) = make_float2(s[m][2 * half], s[m][2 * half + 1]);
        if (HC && q == g / 2) to[m * 8 + 6] = g % 2 ? squares[m][2 * half + 1] : squares[m][2 * half];
      }
      if (!HC && q == g / 2) to[M] = g % 2 ? squares[half][2 * half + 1] : squares[half][2 * half];
    }
  }
};

// x' of 8 columns in place of x, u in place of y; adds to the sums.
__device__ __forceinline__ void mix_columns(unsigned char* tile, const Phi* phi, const Mappings& mappings,
                                            Sums& sums, int columns, int lane) {
  const int row = lane % 16 * PITCH + (columns ^ key(lane)) * 16, pair_row = row + lane / 16 * STREAM;
  u32 word[4];
  float x[N][4], y[4], mixed[N][4];
#pragma unroll
  for (int i = 0; i < N; i += 2) {
    load_matrices(word, tile + pair_row + i * STREAM);
    unpack(x[i], word[0], word[1]);
    unpack(x[i + 1], word[2], word[3]);
  }
  load_matrices(word, tile + row + Y);  // twice the same
  unpack(y, word[0], word[1]);
  __syncwarp();
#pragma unroll
  for (int i = 0; i < N; i += 2) {
    const u32 a[4] = {pack_bf16(mappings.mix(x, y, i, 0), mappings.mix(x, y, i, 1)),
                      pack_bf16(mappings.mix(x, y, i, 2), mappings.mix(x, y, i, 3)),
                      pack_bf16(mappings.mix(x, y, i + 1, 0), mappings.mix(x, y, i + 1, 1)),
                      pack_bf16(mappings.mix(x, y, i + 1, 2), mappings.mix(x, y, i + 1, 3))};
    store_matrices(tile + pair_row + i * STREAM, a[0], a[1], a[2], a[3]);
#if HC
    const Phi b = phi[columns * 32];
#pragma unroll
    for (int k = 0; k < 4; k += 2) {
      const u32 twice[4] = {a[k], a[k + 1], a[k], a[k + 1]}, apart[4] = {a[k], 0, 0, a[k + 1]};
      multiply_bf16(sums.s[i + k / 2], twice, b.x, b.y);
      multiply_bf16(sums.squares[i + k / 2], apart, a[k], a[k + 1]);
    }
#else
#pragma unroll
    for (int m = 0; m < 3; ++m) {
      const Phi b = phi[((columns * 2 + i / 2) * 3 + m) * 32];
      multiply_bf16(sums.s[m], a, b.x, b.y);
      multiply_bf16(sums.s[m], a, b.z, b.w);
    }
    multiply_bf16(sums.squares[0], a, a[0], a[2]);
    multiply_bf16(sums.squares[1], a, a[1], a[3]);
#endif
    if (LOOK_AHEAD) unpack(mixed[i], a[0], a[1]), unpack(mixed[i + 1], a[2], a[3]);
  }
  if (LOOK_AHEAD) {
    float u[4];
#pragma unroll
    for (int k = 0; k < 4; ++k)
      u[k] = weighted_sum(mappings.pre[k / 2], mixed[0][k], mixed[1][k], mixed[2][k], mixed[3][k]);
    unsigned char* to = tile + Y + lane / 4 * PITCH + (columns ^ key(lane / 4)) * 16 + lane % 4 * 4;
    *reinterpret_cast<u32*>(to) = pack_bf16(u[0], u[1]);
    *reinterpret_cast<u32*>(to + 8 * PITCH) = pack_bf16(u[2], u[3]);
  }
}

__device__ __forceinline__ void store_step(bf16* mixed, bf16* layer_input, const unsigned char* tile, Place at, int lane,
                                           int T) {
#pragma unroll
  for (int k = 0; k < TOKENS / 4; ++k) {
    const int token = k * 4 + lane / 8;
    if (at.first + token >= T) continue;
    const unsigned char* from = tile + token * PITCH + (lane % 8 ^ key(token)) * 16;
    uint4* to = chunk(mixed, static_cast<u32>(at.first + token) * (N * C / 8) + at.column + lane % 8);
#pragma unroll
    for (int i = 0; i < N; ++i) to[i * (C / 8)] = *reinterpret_cast<const uint4*>(from + i * STREAM);
    if (LOOK_AHEAD)
      *chunk(layer_input, static_cast<u32>(at.first + token) * (C / 8) + at.column + lane % 8) =
          *reinterpret_cast<const uint4*>(from + Y);
  }
}

__device__ __forceinline__ void run(const bf16* x, const bf16* y, const float* post, const float* res, const float* pre,
                                    const bf16* phi, int T, bf16* mixed, bf16* layer_input, float* parts) {
  SHARED_MEMORY(shared);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = threadIdx.x % 32;
  unsigned char* tiles = shared + warp * 2 * TILE;
  const int items = (T + WARPS * TOKENS - 1) / (WARPS * TOKENS) * SPLITS;
  int item = blockIdx.x, step = 0, parity = 0;
  if (item < items) load_step(tiles, shared + PHI, x, y, phi, Place(item, 0, T), lane, T);
  copy_async_commit();
  Mappings mappings;
  Sums total;
  while (item < items) {
    const Place at(item, step, T);
    if (step == 0) {
      total.clear();
      mappings.load(res, post, pre, at.first, lane, T);
    }
    copy_async_wait<0>();
    __syncthreads();
    const bool last = step == STEPS - 1;
    const int next_item = last ? item + static_cast<int>(gridDim.x) : item, next_step = last ? 0 : step + 1;
    if (next_item < items)
      load_step(tiles + (parity ^ 1) * TILE, shared + PHI + (parity ^ 1) * PHI_TILE, x, y, phi,
                Place(next_item, next_step, T), lane, T);
    copy_async_commit();
    unsigned char* tile = tiles + parity * TILE;
    const Phi* own_phi = reinterpret_cast<const Phi*>(shared + PHI + parity * PHI_TILE) + lane;
    // Tensor cores truncate when they accumulate, so four steps are accumulated there and added in float32.
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      Sums sums;
      sums.clear();
#pragma unroll
      for (int columns = 0; columns < 4; ++columns)
        mix_columns(tile, own_phi, mappings, sums, half * 4 + columns, lane);
      total.add(sums);
    }
    __syncwarp();
    store_step(mixed, layer_input, tile, at, lane, T);
    if (last) total.store(parts + static_cast<long long>(item % SPLITS) * T * PARTS, at.first, lane, T);
    item = next_item, step = next_step, parity ^= 1;
  }
}

}  // namespace

// Any grid. x, mixed = x' [T, 4 C]; y, layer_input [T, C]; post, pre [T, 4]; res [T, 16]; phi
// [C / 64, 8, 2, 3, 32, 8] (`phi_fragments`); parts [SPLITS, T, 28]. With HC phi is theta [C / 64, 8, 32, 4]
// (`theta_fragments`), and parts [SPLITS, T, 4, 8] are 6 of s, the sum of squares and an unused one of each stream.
#if LOOK_AHEAD
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    mhc_look_ahead_forward(const bf16* x, const bf16* y, const float* post, const float* res, const float* pre,
                           const bf16* phi, int T, bf16* mixed, bf16* layer_input, float* parts) {
  run(x, y, post, res, pre, phi, T, mixed, layer_input, parts);
}
#else
#if HC
#define KERNEL mhc_hc_boundary_forward
#else
#define KERNEL mhc_boundary_forward
#endif
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    KERNEL(const bf16* x, const bf16* y, const float* post, const float* res, const bf16* phi, int T, bf16* mixed,
           float* parts) {
  run(x, y, post, res, nullptr, phi, T, mixed, nullptr, parts);
}
#endif
