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
#include "boundary/backward_parts.cuh"

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
