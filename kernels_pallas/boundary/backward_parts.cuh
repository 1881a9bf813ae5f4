// What a lane of backward.cu computes of a tile besides t itself: kappa, dphi, the norm's part and what x' alone gives.
#pragma once
#include "boundary/backward_tile.cuh"

namespace {

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

}  // namespace
