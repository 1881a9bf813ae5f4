// Shared by forward.cu and backward.cu: four streams of tokens in pieces of 16 tokens x 8 columns.
// cuda_launches.py gives the sizes that both sides need: C, COLUMNS (of a program, per stream), TOKENS (of a tile),
// WARPS and SHARED_BYTES.
#pragma once
#include "gpu/warp.cuh"

constexpr int N = 4, M = N * N + 2 * N;
constexpr int PITCH = 2 * COLUMNS, THREADS = 32 * WARPS;
static_assert(TOKENS == 16, "of a warp's product of matrices");
static_assert(PITCH == 128, "rows in shared memory, whose 8 chunks are permuted");

// Memory in units of 16 bytes: one register an index, and the address in one instruction.
__device__ __forceinline__ const uint4* chunk(const void* array, u32 index) {
  return static_cast<const uint4*>(array) + index;
}
__device__ __forceinline__ uint4* chunk(void* array, u32 index) { return static_cast<uint4*>(array) + index; }

// A lane's elements of 16 tokens x 8 columns: token g at columns 2q, 2q + 1, then token g + 8 (lane = 4 g + q).
__device__ __forceinline__ void unpack(float (&v)[4], u32 first, u32 second) {
  v[0] = low(first), v[1] = high(first), v[2] = low(second), v[3] = high(second);
}

// An element of one stream of x' = h_res x + h_post y. Both directions sum in this order, because the backward computes
// x' again and must find the bits that the forward has written.
__device__ __forceinline__ float mix(const float4& res, float post, float x0, float x1, float x2, float x3,
                                     float y) {
  float v = res.x * x0;
  v = fmaf(res.y, x1, v);
  v = fmaf(res.z, x2, v);
  v = fmaf(res.w, x3, v);
  return fmaf(post, y, v);
}
