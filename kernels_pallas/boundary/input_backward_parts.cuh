// The two kinds of work of input_backward.cu: rows, and the mappings of a token in one thread.
#pragma once
#include "gpu/sinkhorn.cuh"

namespace {

constexpr int N = 4, THREADS = 32 * WARPS, CHUNKS = C / 8;  // CHUNKS pieces of 16 bytes of a stream
constexpr bool SINKHORN = !HC && LOGITS < 0;
constexpr int OF_RES = LOGITS < 0 ? N * N : LOGITS;  // numbers of a token in h_res or of its logits
constexpr int M = 2 * N + OF_RES, VALUES = M + 3;    // columns of s; sums: dbias, dalpha
constexpr int PIECES = HC ? N : 3;                   // of 8 columns that ds has
constexpr int SUMS = NORM ? 2 * N : N;               // of a row
constexpr float NORM_EPS = float_of(NORM_EPS_BITS);
static_assert(TOKENS == 16 || TOKENS == 32, "a lane of one warp has one token, a tile of backward.cu 16");
static_assert(C % 64 == 0, "the other CUDA kernels take no other");
static_assert(VALUES <= 32, "a lane sums one of them");

// Shared memory: the tape of Sinkhorn-Knopp, in whose place come fragments of ds (float32, then bfloat16 pairs) and the
// numbers to be summed, a row of 33 each, so that 32 rows are read without conflicts; behind it the rows' sums.
constexpr int DS_BYTES = TOKENS * 8 * PIECES * 4, PITCH = 33;
constexpr int PAIRS = DS_BYTES, TO_SUM = 2 * DS_BYTES, OWN = TO_SUM + 32 * PITCH * 4;
constexpr int TAPE = SINKHORN ? sinkhorn::tape(NUM_ITERATIONS) * 32 * 16 : 0;
constexpr int ROWS = TAPE > OWN ? TAPE : OWN;
static_assert(SHARED_BYTES == ROWS + TOKENS * SUMS * 4, "cuda_input_backward.py counts otherwise");

__device__ __forceinline__ u32 at(const uint4& v, int k) { return k == 0 ? v.x : k == 1 ? v.y : k == 2 ? v.z : v.w; }

// Sums v over the lanes. Lane l is left with the sum of number l / (32 / COUNT): a lane gives away half of its numbers
// as long as it has several.
template <int COUNT>
__device__ __forceinline__ float sum_over_lanes(float (&v)[COUNT], int lane) {
  int bit = 16;
#pragma unroll
  for (int count = COUNT / 2; count > 0; count /= 2, bit /= 2) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const float keep = lane & bit ? v[i + count] : v[i], give = lane & bit ? v[i] : v[i + count];
      v[i] = keep + __shfl_sync(0xffffffffu, give, lane ^ bit);
    }
  }
#pragma unroll
  for (; bit > 0; bit /= 2) v[0] += __shfl_sync(0xffffffffu, v[0], lane ^ bit);
  return v[0];
}

// The lane's 16 bytes of each stream, then of d, AT pieces behind these.
template <int AT>
__device__ __forceinline__ void load_chunks(uint4 (&row)[N + 1], const uint4* streams, const uint4* single) {
  row[0] = load_once<AT>(streams);
  row[1] = load_once<AT + CHUNKS>(streams);
  row[2] = load_once<AT + 2 * CHUNKS>(streams);
  row[3] = load_once<AT + 3 * CHUNKS>(streams);
  row[N] = single[AT];
}

// Writes the sums of one token's row. A lane loads 16 bytes of each stream and of d, twice before it computes.
__device__ __forceinline__ void row_sums(const bf16* x, const bf16* d, const float* weights, const float* pre,
                                         u32 token, int lane, float* out) {
  constexpr int STEPS = C > 256 ? 2 : 1;  // of 32 lanes at a time
  constexpr bool EVEN = CHUNKS % (32 * STEPS) == 0;
  const uint4* const streams = reinterpret_cast<const uint4*>(x) + token * (N * CHUNKS) + lane;
  const uint4* const single = reinterpret_cast<const uint4*>(d) + token * CHUNKS + lane;
  float4 h = {};
  if (NORM) h = reinterpret_cast<const float4*>(pre)[token];
  float sums[SUMS] = {};
#pragma unroll 1
  for (int first = 0; first < CHUNKS; first += 32 * STEPS) {
    uint4 row[STEPS][N + 1] = {};
    if (EVEN || first + lane < CHUNKS) load_chunks<0>(row[0], streams + first, single + first);
    if (STEPS > 1 && (EVEN || first + 32 + lane < CHUNKS))
      load_chunks<32>(row[STEPS - 1], streams + first, single + first);
    __syncwarp();  // or the assembler moves half of the loads behind what waits for the others
#pragma unroll
    for (int k = 0; k < STEPS; ++k) {
      const int piece = first + 32 * k + lane;
      float4 w[2] = {};
      if (NORM && (EVEN || piece < CHUNKS)) {
        w[0] = reinterpret_cast<const float4*>(weights)[2 * piece];
        w[1] = reinterpret_cast<const float4*>(weights)[2 * piece + 1];
      }
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        float v[N + 1];
#pragma unroll
        for (int i = 0; i <= N; ++i) {
          const u32 word = at(row[k][i], e / 2);
          v[i] = e % 2 ? high(word) : low(word);
        }
        if (NORM) v[N] *= at(w[e / 4], e % 4);
#pragma unroll
        for (int i = 0; i < N; ++i) sums[i] = fmaf(v[i], v[N], sums[i]);
        if (NORM) {
          const float u = weighted_sum(h, v[0], v[1], v[2], v[3]);
#pragma unroll
          for (int i = 0; i < N; ++i) sums[SUMS - N + i] = fmaf(v[i], u, sums[SUMS - N + i]);
        }
      }
    }
  }
  const float sum = sum_over_lanes(sums, lane);
  if (lane % (32 / SUMS) == 0) out[lane / (32 / SUMS)] = sum;
}

// Takes <x'_i, w d> and <x'_i, u> to dh_pre, and returns inverse, kappa_n, 0, 0.
__device__ __forceinline__ float4 behind_norm(float (&dpre)[N], const float* with_u, const float* pre, u32 token) {
  const float4 h = reinterpret_cast<const float4*>(pre)[token];
  float squares = 0, product = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    squares = fmaf(at(h, i), with_u[i], squares);
    product = fmaf(at(h, i), dpre[i], product);
  }
  const float inverse = rsqrtf(squares * (1.0f / C) + NORM_EPS);
  const float kappa = product * inverse * inverse * inverse * (1.0f / C);
#pragma unroll
  for (int i = 0; i < N; ++i) dpre[i] = fmaf(inverse, dpre[i], -kappa * with_u[i]);
  return make_float4(inverse, kappa, 0, 0);
}

// exp(x) for x <= 88, so that it is finite: callers use it as 1 / (1 + exp).
__device__ __forceinline__ float finite_exp(float x) { return expf(fminf(x, 88.0f)); }

// tanh(x) and its derivative, both to about 1e-7 of their size (Cephes' tanhf).
__device__ __forceinline__ float2 tanh_of(float x) {
  const float e = expf(-2 * fabsf(x)), inverse = reciprocal(1 + e), square = x * x;
  const float large = (1 - e) * inverse;
  float p = fmaf(-5.70498872745e-3f, square, 2.06390887954e-2f);
  p = fmaf(p, square, -5.37397155531e-2f);
  p = fmaf(p, square, 1.33314422036e-1f);
  p = fmaf(p, square, -3.33332819422e-1f);
  const float small = fmaf(p * square, x, x);
  return make_float2(fabsf(x) < 0.625f ? small : x < 0 ? -large : large, 4 * e * inverse * inverse);
}

// Rounds to the nearest TF32 number, ties to even; NaN and inf stay.
__device__ __forceinline__ float round_tf32(float x) {
  const u32 bits = __float_as_uint(x);
  return fabsf(x) < __uint_as_float(0x7f800000u) ? __uint_as_float((bits + 0xfff + (bits >> 13 & 1)) & 0xffffe000u) : x;
}

// COUNT numbers of a token from an array [T, ROW], from column `first` on.
template <int COUNT, int ROW>
__device__ __forceinline__ void load_row(float* to, const float* from, u32 token, int first) {
  if constexpr (COUNT % 4 == 0 && ROW % 4 == 0) {
#pragma unroll
    for (int k = 0; k < COUNT / 4; ++k) {
      const float4 v = reinterpret_cast<const float4*>(from)[(token * ROW + first) / 4 + k];
      to[4 * k] = v.x, to[4 * k + 1] = v.y, to[4 * k + 2] = v.z, to[4 * k + 3] = v.w;
    }
  } else {
#pragma unroll
    for (int k = 0; k < COUNT; ++k) to[k] = from[token * ROW + first + k];
  }
}

// The mappings of the lane's token. `go_back` puts its columns of ds and numbers to sum into shared memory, where the
// tape has been, `go_back_from_pre` the rest.
class Mappings {
 public:
  __device__ __forceinline__ Mappings(unsigned char* shared, int lane, const float* r, const float* alpha, u32 token)
      : shared_(shared), lane_(lane) {
    load_row<NORMS, NORMS>(inverse_, r, token, 0);
#pragma unroll
    for (int k = 0; k < NORMS; ++k) inverse_[k] = reciprocal(inverse_[k]);
#pragma unroll
    for (int gate = 0; gate < 3; ++gate) alpha_[gate] = alpha[gate];
  }

  // Everything but what comes from dh_pre. A token that is not `inside` has cotangents of zero.
  __device__ __forceinline__ void go_back(const float* s, const float* bias, const float* dpost, const float* dres,
                                          u32 token, bool inside) {
    float d_post[N] = {}, d_res[OF_RES ? OF_RES : 1] = {};
    if (inside) load_row<OF_RES, OF_RES>(d_res, dres, token, 0);
#if !HC && LOGITS < 0
    {
      float m[N * N];
      load_row<N * N, M>(m, s, token, 2 * N);
#pragma unroll
      for (int k = 0; k < N * N; ++k) m[k] = fmaf(m[k] * inverse_[0], alpha_[2], bias[2 * N + k]);
      sinkhorn::project_backward<NUM_ITERATIONS>(m, d_res, reinterpret_cast<float4*>(shared_) + lane_);
#pragma unroll
      for (int k = 0; k < N * N; ++k) d_res[k] = m[k];
    }
#endif
    __syncwarp();  // all lanes are done with the tape
    if (inside) load_row<N, N>(d_post, dpost, token, 0);
    float sums[2] = {};
    if constexpr (HC) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        float v[6];
        load_row<6, 6>(v, s, token * N + j, 0);
        put_gate(1, j, v[1], 0, d_post[j], sums[0]);
#pragma unroll
        for (int i = 0; i < N; ++i) put_gate(2 + i, j, v[2 + i], 0, d_res[i * N + j], sums[1]);
        put_ds(8 * j + 6, 0);
        put_ds(8 * j + 7, 0);
      }
    } else {
      float v[M - N];
      load_row<M - N, M>(v, s, token, N);
#pragma unroll
      for (int i = 0; i < N; ++i) put_gate(1, i, v[i], bias[N + i], d_post[i], sums[0]);
#pragma unroll
      for (int k = 0; k < OF_RES; ++k) {
        const float normed = v[N + k] * inverse_[0];
        put(2 * N + k, 2 * N + k, 0, normed, d_res[k], d_res[k] * alpha_[2], normed, sums[1]);
      }
#pragma unroll
      for (int k = M; k < 8 * PIECES; ++k) put_ds(k, 0);
    }
    put_sum(M + 1, sums[0]);
    put_sum(M + 2, sums[1]);
  }

  __device__ __forceinline__ void go_back_from_pre(const float* s, const float* bias, const float (&dpre)[N],
                                                   u32 token) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < N; ++i)
      put_gate(0, i, s[HC ? (token * N + i) * 6 : token * M + i], HC ? 0 : bias[i], dpre[i], sum);
    put_sum(M, sum);
  }

  // Writes and forgets what came together so far of kappa, the factor of the streams.
  __device__ __forceinline__ void store_kappa(float* kappa, u32 token) {
    float v[NORMS];
#pragma unroll
    for (int k = 0; k < NORMS; ++k) {
      v[k] = -total_[k] * inverse_[k] * inverse_[k] * (1.0f / (HC ? C : N * C));
      total_[k] = 0;
    }
    if constexpr (HC)
      reinterpret_cast<float4*>(kappa)[token] = make_float4(v[0], v[1], v[2], v[3]);
    else
      kappa[token] = v[0];
  }

  // Writes the fragments of the warp's tokens, `tiles` from `first` on, and sums over the tokens as column `program`.
  __device__ __forceinline__ void store(float* ds, bf16* pairs, float* sums, u32 first, int tiles) const {
    const uint4* const from = reinterpret_cast<const uint4*>(shared_);
    uint4* const to = reinterpret_cast<uint4*>(ds) + first * (32 * PIECES);
    uint4* const to_pairs = reinterpret_cast<uint4*>(pairs) + first * (32 * PIECES);
#pragma unroll 2
    for (int k = lane_; k < 32 * PIECES * tiles; k += 32) {
      to[k] = from[k];
      to_pairs[k] = from[PAIRS / 16 + k];
    }
    if (lane_ < VALUES) {
      const float* const row = reinterpret_cast<const float*>(shared_ + TO_SUM) + lane_ * PITCH;
      float sum = 0;
#pragma unroll
      for (int k = 0; k < TOKENS; ++k) sum += row[k];
      sums[lane_ * gridDim.x] = sum;
    }
  }

 private:
  static constexpr int NORMS = HC ? N : 1;

  __device__ __forceinline__ void put_ds(int column, float ds) const {
    if (lane_ >= TOKENS) return;
    const int half = lane_ % 16 / 8, piece = lane_ / 16 * PIECES + column / 8, c = column % 8;
    float* const to = reinterpret_cast<float*>(shared_) + (piece * 32 + lane_ % 8 * 4 + c / 2) * 4 + half + c % 2 * 2;
    bf16* const to_pair =
        reinterpret_cast<bf16*>(shared_ + PAIRS) + (piece * 32 + c * 4 + lane_ % 8 / 2) * 8 + half * 4 + lane_ % 2;
    const u32 term = pack_bf16(ds, 0);
    *to = ds;
    to_pair[0] = static_cast<bf16>(term);
    to_pair[2] = static_cast<bf16>(pack_bf16(ds - low(term), 0));
  }

  __device__ __forceinline__ void put_sum(int row, float v) const {
    reinterpret_cast<float*>(shared_ + TO_SUM)[row * PITCH + lane_] = v;
  }

  // A column of ds and a row of numbers to sum. The cotangents are d of the bias and d_normed of s / r = `normed`. The
  // sum of d times `with_d` goes on.
  __device__ __forceinline__ void put(int column, int row, int norm, float normed, float d, float d_normed,
                                      float with_d, float& sum) {
    total_[norm] = fmaf(d_normed, normed, total_[norm]);
    sum = fmaf(d, with_d, sum);
    put_sum(row, d);
    put_ds(column, round_tf32(d_normed * inverse_[norm]));
  }

  // Number i of h_pre (gate 0) or h_post (1), given its cotangent d. With HC i is the stream, and gates from 2 on are
  // rows of h_res.
  __device__ __forceinline__ void put_gate(int gate, int i, float s, float bias, float d, float& sum) {
    const float normed = s * inverse_[HC ? i : 0], a = alpha_[min(gate, 2)];
    if constexpr (HC) {
      const float2 tanh = tanh_of(normed);
      put(8 * i + gate, N * gate + i, i, normed, d, d * a * tanh.y, tanh.x, sum);
    } else {
      const float inverse_odds = finite_exp(-fmaf(normed, a, bias)), h = reciprocal(1 + inverse_odds);
      // 1 - h as inverse_odds h, which does not cancel if the gate is open.
      const float d_logit = d * (1 + gate) * (inverse_odds * h) * h;
      put(N * gate + i, N * gate + i, 0, normed, d_logit, d_logit * a, normed, sum);
    }
  }

  unsigned char* const shared_;
  const int lane_;
  float inverse_[NORMS], alpha_[3], total_[NORMS] = {};  // 1 / r; sums of d_normed times s / r
};

}  // namespace
