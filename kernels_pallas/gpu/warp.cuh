// The operations of a warp as functions: matrices in shared memory, tensor cores, asynchronous copies.
//
// A "fragment" is a matrix spread over the 32 lanes of a warp. Lane = 4 g + q below (g 0..7, q 0..3), the
// convention of the PTX manual (section "Matrix fragments for mma.m16n8k8").
#pragma once

#ifdef MHC_EMULATE
#include "emulate.hpp"  // the same functions on a CPU
#else

typedef unsigned int u32;
typedef unsigned short bf16;  // its bits

#define SHARED_MEMORY(name) extern __shared__ __align__(1024) unsigned char name[]

__device__ __forceinline__ u32 shared_address(const void* p) {
  return static_cast<u32>(__cvta_generic_to_shared(p));
}

// Rounds to bfloat16, to nearest even: `low` into the lower half of a word.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
  u32 word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// Copies 16 or 4 bytes from global to shared memory, or zeros if !valid (then `from` is not read).
__device__ __forceinline__ void copy_async_16(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void copy_async_4(void* to, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 4 : 0)
               : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` of this thread's committed groups are still under way.
template <int pending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Writes 16 bytes that nobody reads soon: L2 gives them up before all else. (Asynchronous copies have such a hint too,
// but ptxas made an illegal instruction of it.)
__device__ __forceinline__ void store_once(uint4* to, const uint4& v) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// Reads from[OFFSET], which nobody reads soon; see `store_once`. The offset is in the instruction, takes no register.
template <int OFFSET>
__device__ __forceinline__ uint4 load_once(const uint4* from) {
  uint4 v;
  asm volatile(
      "{ .reg .b64 policy; createpolicy.fractional.L2::evict_first.b64 policy, 1.0; "
      "ld.global.L1::evict_first.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4 + %5], policy; }"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(from), "n"(16 * OFFSET));
  return v;
}

// 1 / x to one unit in the last place, in one instruction; x from 1e-37 to 1e37. A division takes eight.
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Four 8 x 8 matrices of 16-bit numbers; lane l gives the address of row l % 8 of matrix l / 8. Word k of the
// result: elements (g, 2q) and (g, 2q + 1) of matrix k.
__device__ __forceinline__ void load_matrices(u32 (&word)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
               : "r"(shared_address(row))
               : "memory");
}

// The reverse: words of four matrices to the rows that the lanes name.
__device__ __forceinline__ void store_matrices(void* row, u32 a, u32 b, u32 c, u32 d) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(a),
               "r"(b), "r"(c), "r"(d)
               : "memory");
#else
  const u32 words[4] = {a, b, c, d}, lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const u32 to = __shfl_sync(0xffffffffu, shared_address(row), 8 * k + lane / 4) + lane % 4 * 4;
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(words[k]) : "memory");
  }
#endif
}

// Takes word (g, 2q..2q+1) of an 8 x 8 matrix of 16-bit numbers and returns that word of the transposed matrix.
__device__ __forceinline__ u32 transpose(u32 word) {
  u32 out;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(word));
  return out;
}

// d += a b for a [16, 8], b [8, 8], d [16, 8] on the tensor cores, which drop all but the 10 upper bits of the
// mantissas of a and b. a: (g, q), (g + 8, q), (g, q + 4), (g + 8, q + 4); b: (q, g), (q + 4, g);
// d: (g, 2q), (g, 2q + 1), (g + 8, 2q), (g + 8, 2q + 1).
__device__ __forceinline__ void multiply_tf32(float (&d)[4], float a0, float a1, float a2, float a3, float b0,
                                              float b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)),
        "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

// d += a b for bfloat16 a [16, 16], b [16, 8]. Words of a: rows g, g + 8, g, g + 8 at columns 2q (twice), 2q + 8;
// of b: rows (inner index) 2q, 2q + 8 of column g; d as above.
__device__ __forceinline__ void multiply_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif

// bfloat16 numbers in the lower and upper half of a word, as float32.
__device__ __forceinline__ float low(u32 word) { return __uint_as_float(word << 16); }
__device__ __forceinline__ float high(u32 word) { return __uint_as_float(word & 0xffff0000u); }

// A float that came as an integer macro with the same bits (`cuda_launch.float_bits`), which is not negative.
__device__ constexpr float float_of(int bits) {
  // 2^23 + mantissa, scaled; a constant expression cannot look at bits.
  float v = (bits & 0x7fffff) | (bits >> 23 ? 0x800000 : 0);
  for (int e = bits >> 23 ? bits >> 23 : 1; e < 150; ++e) v /= 2;
  for (int e = bits >> 23; e > 150; --e) v *= 2;
  return v;
}

__device__ __forceinline__ float at(const float4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// An element of u = h_pre x'. All kernels sum in this order: a backward computes u again and must find the same bits.
__device__ __forceinline__ float weighted_sum(const float4& pre, float x0, float x1, float x2, float x3) {
  float v = pre.x * x0;
  v = fmaf(pre.y, x1, v);
  v = fmaf(pre.z, x2, v);
  return fmaf(pre.w, x3, v);
}
