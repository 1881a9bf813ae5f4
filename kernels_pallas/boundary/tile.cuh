// What the kernels of this folder share: tiles of 16 tokens x 64 columns of each of the four streams.
#pragma once
#include "cuda/warp.cuh"

constexpr int N = 4, M = N * N + 2 * N, K = N * C;
constexpr int TOKENS = 16;                     // of a tile
constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int COLUMNS = 8 * WARPS;             // of a program, per stream; each warp owns 8 of them
constexpr int PITCH = 2 * COLUMNS;             // bytes of a row in shared memory: one stream of one token
constexpr int STREAMS = N * TOKENS * PITCH;    // bytes of a tile of streams, rows by stream and token

// The 16-byte chunks of a row are permuted: chunk c lies in place c ^ key, so that neither 8 tokens of a stream nor
// 4 tokens of 2 streams meet in one bank.
__device__ __forceinline__ int key(int stream, int token) { return token % 8 ^ stream % 2 * 4; }

// Memory in units of 16 bytes: one register an index, and the address in one instruction.
__device__ __forceinline__ const uint4* chunk(const void* array, u32 index) {
  return static_cast<const uint4*>(array) + index;
}
__device__ __forceinline__ uint4* chunk(void* array, u32 index) { return static_cast<uint4*>(array) + index; }

// The part of a tile that a thread moves: 16 bytes of streams `half` and `half + 2`, and 16 bytes of an array of one
// row a token (if `half` says so).
struct Share {
  int token, half, column;    // column in chunks
  int streams, single;        // where the chunk lies in shared memory, from the first row of the array

  __device__ __forceinline__ Share(u32 thread, int slab)
      : token(thread / WARPS % TOKENS), half(thread / (WARPS * TOKENS)), column(slab * WARPS + thread % WARPS) {
    const int chunk = thread % WARPS;
    streams = (half * TOKENS + token) * PITCH + (chunk ^ key(half, token)) * 16;
    single = token * PITCH + (chunk ^ key(0, token)) * 16;
  }
  __device__ __forceinline__ u32 stream(int first) const { return ((first + token) * N + half) * (C / 8) + column; }
  __device__ __forceinline__ u32 row(int first) const { return (first + token) * (C / 8) + column; }
};

// Starts the copy of a tile of streams, 4 C numbers a token.
__device__ __forceinline__ void copy_streams(unsigned char* to, const Share& share, const bf16* from, int first,
                                             int T) {
  const bool inside = first + share.token < T;
  const u32 at = share.stream(first);
  copy_async_16(to + share.streams, chunk(from, at), inside);
  copy_async_16(to + share.streams + 2 * TOKENS * PITCH, chunk(from, at + 2 * C / 8), inside);
}

__device__ __forceinline__ void store_streams(bf16* to, const Share& share, const unsigned char* from, int first,
                                              int T) {
  if (first + share.token >= T) return;
  const u32 at = share.stream(first);
  *chunk(to, at) = *reinterpret_cast<const uint4*>(from + share.streams);
  *chunk(to, at + 2 * C / 8) = *reinterpret_cast<const uint4*>(from + share.streams + 2 * TOKENS * PITCH);
}

// A lane's elements of 16 tokens x 8 columns: token g at columns 2q, 2q + 1, then token g + 8 (lane = 4 g + q).
__device__ __forceinline__ void unpack(float (&v)[4], u32 first, u32 second) {
  v[0] = low(first), v[1] = high(first), v[2] = low(second), v[3] = high(second);
}

__device__ __forceinline__ float4 load4(const void* p) { return *static_cast<const float4*>(p); }
__device__ __forceinline__ float at(const float4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// This warp's 8 columns of a tile of streams, and of arrays of one row a token.
struct Columns {
  int streams, single, second;  // a lane's row for load_matrices: half of the tokens and one of two by matrix

  __device__ __forceinline__ Columns(int warp, int lane) {
    second = lane / 16 * TOKENS * PITCH;
    streams = second + lane % 16 * PITCH + (warp ^ key(lane / 16, lane % 8)) * 16;
    single = lane % 16 * PITCH + (warp ^ key(0, lane % 8)) * 16;
  }
  __device__ __forceinline__ void load(float (&v)[N][4], const unsigned char* tile) const {
    u32 word[4];
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      load_matrices(word, tile + streams + i * TOKENS * PITCH);
      unpack(v[i], word[0], word[1]);
      unpack(v[i + 1], word[2], word[3]);
    }
  }
  __device__ __forceinline__ void load(float (&v)[4], const unsigned char* rows) const {
    u32 word[4];
    load_matrices(word, rows + single);
    unpack(v, word[0], word[1]);
  }
  // Of two arrays, one after the other in memory.
  __device__ __forceinline__ void load(float (&v)[4], float (&w)[4], const unsigned char* rows) const {
    u32 word[4];
    load_matrices(word, rows + single + second);
    unpack(v, word[0], word[1]);
    unpack(w, word[2], word[3]);
  }
};

// The lane's words of a stored tile (`store`): rows g and g + 8.
__device__ __forceinline__ void store_columns(unsigned char* rows, int stream, int warp, int lane, float a, float b,
                                              float c, float d) {
  const int g = lane / 4, q = lane % 4;
  unsigned char* to = rows + g * PITCH + (warp ^ key(stream, g)) * 16 + q * 4;
  *reinterpret_cast<u32*>(to) = pack_bf16(a, b);
  *reinterpret_cast<u32*>(to + 8 * PITCH) = pack_bf16(c, d);
}

// One stream of x' = h_res x + h_post y, products in this order and sums in float32.
__device__ __forceinline__ float mix(const float4& res, float post, const float (&x)[N][4], float y, int k) {
  float v = res.x * x[0][k];
  v = fmaf(res.y, x[1][k], v);
  v = fmaf(res.z, x[2][k], v);
  v = fmaf(res.w, x[3][k], v);
  return fmaf(post, y, v);
}

// Products, summed over the program's columns, of two streams (rows) of the same token: 4 tokens x 4 streams of the
// tile `rows` against 4 tokens x 2 streams of the tile `columns`. Warp-wide work item `unit` 0..7: tokens
// 4 (unit % 4) .. + 3, streams 2 (unit / 4), + 1 of `columns`. Lane 4 g + q holds a useful result if g % 4 == q: of
// token q, stream g / 4 (sum[0], sum[1]) and g / 4 + 2 (sum[2], sum[3]) against the two streams of `columns`.
struct TokenProducts {
  int token, stream, pair;    // of the lane's results: token of the tile, stream and pair of streams
  bool holds;
  u32 a[4][4];

  __device__ __forceinline__ TokenProducts(int unit, int lane, const unsigned char* rows)
      : token(unit % 4 * 4 + lane % 4), stream(lane / 16), pair(unit / 4), holds(lane % 4 == lane / 4 % 4) {
    const int s = lane / 4 % 4;
    const unsigned char* row = rows + (s * TOKENS + token) * PITCH;
#pragma unroll
    for (int k = 0; k < 4; ++k) load_matrices(a[k], row + (2 * k + lane / 16 ^ key(s, token)) * 16);
  }
  // `apart`: bytes between the two streams; 0 to take one twice.
  __device__ __forceinline__ void sum(float (&out)[4], int lane, const unsigned char* columns, int apart) const {
    const int s = apart ? lane % 2 : 0, t = token - lane % 4 + lane % 8 / 2;
    const unsigned char* row = columns + s * apart + t * PITCH;
    u32 b[2][4];
#pragma unroll
    for (int k = 0; k < 2; ++k) load_matrices(b[k], row + (4 * k + lane / 8 ^ key(s, t)) * 16);
#pragma unroll
    for (int k = 0; k < 4; ++k) multiply_bf16(out, a[k], b[k / 2][k % 2 * 2], b[k / 2][k % 2 * 2 + 1]);
  }
};
