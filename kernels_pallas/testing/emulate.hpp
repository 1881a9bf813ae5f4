// warp.cuh and the parts of CUDA that our kernels need, for a CPU, to test the kernels without a GPU.
//
// Where the hardware leaves a value undefined, the emulator makes that show. Shared memory starts as NaNs. An
// asynchronous copy leaves NaNs until its thread waits for it, and reads its source only then. load_matrices reads a
// row when the lane that names it arrives; store_matrices writes a row when that lane goes on. So a __syncwarp() must
// stand between the write of one lane and the read of another.
// It does not cover weak memory order (all threads see one order) and sums inside of the tensor cores (float64 here).
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "launch.hpp"

typedef unsigned int u32;
typedef unsigned short bf16;  // its bits

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

// In a function, once.
#define SHARED_MEMORY(name) unsigned char* const name = emulate::shared_memory()

struct alignas(8) float2 {
  float x, y;
};
struct alignas(8) uint2 {
  u32 x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  u32 x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulate {

inline unsigned char* shared_memory() { return state.lane->warp->block->memory + kZone; }

inline void check_shared(const char* what, Site site, const void* p, ptrdiff_t bytes) {
  const ptrdiff_t offset = static_cast<const unsigned char*>(p) - shared_memory();
  const std::string where = "shared address " + std::to_string(offset);
  if (offset < 0 || offset + bytes > ptrdiff_t(state.shared_bytes))
    fail(what, site, where + " outside of " + std::to_string(state.shared_bytes) + " bytes");
  if (offset % bytes) fail(what, site, where + " is not a multiple of " + std::to_string(bytes));
}

template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

inline u32 round_bf16(float x) {
  const u32 word = bits<u32>(x);
  return x != x ? 0x7fff : (word + 0x7fff + (word >> 16 & 1)) >> 16;
}

inline double drop_tf32(u32 word) { return bits<float>(word & 0xffffe000u); }

// A product d += a b for a [16, K], b [K, 8]; lanes' words: d (4), a (4), b (2). `load(words, g, q, a, b)` places a
// lane's words of a and b.
template <int K, class Load>
inline void multiply_words(Warp& warp, Load load) {
  typedef double Row __attribute__((vector_size(64)));
  double a[16][K];
  Row b[K], d[16];
  for (int lane = 0; lane < 32; ++lane) {
    const u32* word = warp.word[lane];
    const int g = lane / 4, q = lane % 4;
    for (int i = 0; i < 4; ++i) d[g + i / 2 * 8][2 * q + i % 2] = bits<float>(word[i]);
    load(word + 4, g, q, a, b);
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < K; ++k) d[row] += a[row][k] * b[k];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      warp.word[lane][i] = bits<u32>(float(d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]));
}

inline void multiply_tf32_words(Warp& warp) {
  multiply_words<8>(warp, [](const u32* word, int g, int q, auto& a, auto& b) {
    for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][q + i / 2 * 4] = drop_tf32(word[i]);
    for (int i = 0; i < 2; ++i) b[q + 4 * i][g] = drop_tf32(word[4 + i]);
  });
}

inline void multiply_bf16_words(Warp& warp) {
  multiply_words<16>(warp, [](const u32* word, int g, int q, auto& a, auto& b) {
    for (int half = 0; half < 2; ++half) {
      auto number = [&](int i) { return bits<float>(half ? word[i] & 0xffff0000u : word[i] << 16); };
      for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][2 * q + half + i / 2 * 8] = number(i);
      for (int i = 0; i < 2; ++i) b[2 * q + half + 8 * i][g] = number(4 + i);
    }
  });
}

}  // namespace emulate

inline float __uint_as_float(u32 x) { return emulate::bits<float>(x); }
inline u32 __float_as_uint(float x) { return emulate::bits<u32>(x); }
inline float reciprocal(float x) { return 1 / x; }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
template <class T>
inline T min(T a, T b) {
  static_assert(std::is_integral_v<T>);
  return b < a ? b : a;
}

inline void __syncthreads(emulate::Site site = emulate::here()) { emulate::meet_block(site); }
inline void __syncwarp(u32 mask = ~0u, emulate::Site site = emulate::here()) {
  emulate::meet("__syncwarp", mask, site, [](emulate::Warp&) {});
}
template <class T>
inline T __shfl_sync(u32 mask, T value, int lane, emulate::Site site = emulate::here()) {
  const u32 from = lane & 31;
  if (!(mask >> from & 1)) emulate::fail("__shfl_sync", site, "reads a lane outside of the mask");
  u32* own = emulate::state.lane->warp->word[emulate::state.lane->thread % 32];
  own[0] = emulate::bits<u32>(value);
  own[1] = from;
  emulate::meet("__shfl_sync", mask, site, [mask](emulate::Warp& warp) {
    for (int lane = 0; lane < 32; ++lane)
      if (mask >> lane & 1) warp.word[lane][2] = warp.word[warp.word[lane][1]][0];
  });
  return emulate::bits<T>(own[2]);
}

inline u32 pack_bf16(float low, float high) { return emulate::round_bf16(low) | emulate::round_bf16(high) << 16; }

namespace emulate {
inline void copy_async(const char* what, void* to, const void* from, bool valid, size_t bytes, Site site) {
  check_shared(what, site, to, bytes);
  if (valid && reinterpret_cast<size_t>(from) % bytes)
    fail(what, site, "the global address is not a multiple of " + std::to_string(bytes));
  poison(to, bytes);
  state.lane->copies.push_back({to, valid ? from : nullptr, bytes});
}
}  // namespace emulate

inline void copy_async_16(void* to, const void* from, bool valid, emulate::Site site = emulate::here()) {
  emulate::copy_async("copy_async_16", to, from, valid, 16, site);
}
template <int OFFSET>
inline uint4 load_once(const uint4* from) {
  return from[OFFSET];
}
inline void store_once(uint4* to, const uint4& v) { *to = v; }
inline void copy_async_4(void* to, const void* from, bool valid, emulate::Site site = emulate::here()) {
  emulate::copy_async("copy_async_4", to, from, valid, 4, site);
}

inline void copy_async_commit() {
  emulate::Lane& lane = *emulate::state.lane;
  size_t committed = 0;
  for (size_t group : lane.groups) committed += group;
  lane.groups.push_back(lane.copies.size() - committed);
}

template <int pending>
inline void copy_async_wait() {
  emulate::Lane& lane = *emulate::state.lane;
  while (lane.groups.size() > pending) {
    const auto end = lane.copies.begin() + lane.groups.front();
    for (auto copy = lane.copies.begin(); copy != end; ++copy)
      copy->from ? memcpy(copy->to, copy->from, copy->bytes) : memset(copy->to, 0, copy->bytes);
    lane.copies.erase(lane.copies.begin(), end);
    lane.groups.erase(lane.groups.begin());
  }
  emulate::pause();
}

inline void load_matrices(u32 (&word)[4], const void* row, emulate::Site site = emulate::here()) {
  emulate::check_shared("load_matrices", site, row, 16);
  emulate::Warp& warp = *emulate::state.lane->warp;
  const int lane = emulate::state.lane->thread % 32;
  memcpy(warp.word[lane], row, 16);
  emulate::meet("load_matrices", ~0u, site, [](emulate::Warp& warp) {
    u32 out[32][4];
    for (int lane = 0; lane < 32; ++lane)
      for (int k = 0; k < 4; ++k) out[lane][k] = warp.word[8 * k + lane / 4][lane % 4];
    for (int lane = 0; lane < 32; ++lane) memcpy(warp.word[lane], out[lane], 16);
  });
  memcpy(word, warp.word[lane], 16);
}

inline void store_matrices(void* row, u32 a, u32 b, u32 c, u32 d, emulate::Site site = emulate::here()) {
  emulate::check_shared("store_matrices", site, row, 16);
  emulate::Warp& warp = *emulate::state.lane->warp;
  const int lane = emulate::state.lane->thread % 32;
  const u32 words[4] = {a, b, c, d};
  memcpy(warp.word[lane], words, 16);
  emulate::meet("store_matrices", ~0u, site, [](emulate::Warp& warp) {
    u32 out[32][4];
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) out[lane][i] = warp.word[lane % 8 * 4 + i][lane / 8];
    for (int lane = 0; lane < 32; ++lane) memcpy(warp.word[lane], out[lane], 16);
  });
  memcpy(row, warp.word[lane], 16);
}

inline u32 transpose(u32 word, emulate::Site site = emulate::here()) {
  u32* own = emulate::state.lane->warp->word[emulate::state.lane->thread % 32];
  own[0] = word;
  emulate::meet("transpose", ~0u, site, [](emulate::Warp& warp) {
    auto element = [&](int row, int column) {
      return warp.word[4 * row + column / 2][0] >> column % 2 * 16 & 0xffff;
    };
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, q = lane % 4;
      warp.word[lane][1] = element(2 * q, g) | element(2 * q + 1, g) << 16;
    }
  });
  return own[1];
}

inline void multiply_tf32(float (&d)[4], float a0, float a1, float a2, float a3, float b0, float b1,
                          emulate::Site site = emulate::here()) {
  float* own = reinterpret_cast<float*>(emulate::state.lane->warp->word[emulate::state.lane->thread % 32]);
  const float operands[10] = {d[0], d[1], d[2], d[3], a0, a1, a2, a3, b0, b1};
  memcpy(own, operands, sizeof operands);
  emulate::meet("multiply_tf32", ~0u, site, emulate::multiply_tf32_words);
  memcpy(d, own, sizeof d);
}

inline void multiply_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, emulate::Site site = emulate::here()) {
  u32* own = emulate::state.lane->warp->word[emulate::state.lane->thread % 32];
  memcpy(own, d, sizeof d);
  memcpy(own + 4, a, sizeof a);
  own[8] = b0, own[9] = b1;
  emulate::meet("multiply_bf16", ~0u, site, emulate::multiply_bf16_words);
  memcpy(d, own, sizeof d);
}
