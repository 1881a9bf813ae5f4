// Sinkhorn-Knopp of one 4 x 4 matrix in the registers of one thread.
//
// The first iteration works with logarithms, see sinkhorn/reference.py, and leaves a matrix m. Every later iterate is
// a_i m_ij b_j, so that half a step is a product with a vector and four reciprocals:
//
//   b_j = 1 / sum_i a_i m_ij,   a_i = 1 / sum_j m_ij b_j
//
// and rounding errors do not add up over the steps. Scaling the matrix itself would take 32 instructions in place of
// 20, and the way back would have to undo it. Sums of a column (a row) are at most 4 and at least 1/4 from the first
// iteration on, so a and b stay between 4^-39 and 4^39 in 40 iterations. Their product may overflow where m_ij is 0,
// hence it never stands alone.
//
// With EPS > 0 a sum + EPS is divided by; w_j = 1 / b_j then is sum_i a_i m_ij + EPS w_j of the step before.
#pragma once
#include "gpu/warp.cuh"

namespace sinkhorn {

constexpr int N = 4, MOST_ITERATIONS = 40;
constexpr float EPS = float_of(SINKHORN_EPS_BITS);

// float4 numbers that `project_backward` keeps of a thread: four rows of a softmax, then a and b of every iteration.
__device__ constexpr int tape(int iterations) { return N + 2 * iterations - 1; }

__device__ __forceinline__ void take(float (&v)[N], const float4& from) {
  v[0] = from.x, v[1] = from.y, v[2] = from.z, v[3] = from.w;
}
__device__ __forceinline__ float4 pack(const float* v) { return make_float4(v[0], v[1], v[2], v[3]); }

// Logits in m -> the first iterate, and the softmax over columns.
__device__ __forceinline__ void first_iteration(float (&m)[N * N], float (&softmax)[N * N]) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const float most = fmaxf(fmaxf(m[j], m[N + j]), fmaxf(m[2 * N + j], m[3 * N + j]));
    float total = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      m[i * N + j] -= most;
      softmax[i * N + j] = expf(m[i * N + j]);
      total += softmax[i * N + j];
    }
    const float inverse = reciprocal(total), log_total = logf(total);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      softmax[i * N + j] *= inverse;
      m[i * N + j] -= log_total;
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    float *row = m + i * N, total = EPS;
    const float most = fmaxf(fmaxf(row[0], row[1]), fmaxf(row[2], row[3]));
#pragma unroll
    for (int j = 0; j < N; ++j) {
      row[j] = EPS > 0 ? softmax[i * N + j] + EPS : expf(row[j] - most);
      total += row[j];
    }
    const float inverse = reciprocal(total);
#pragma unroll
    for (int j = 0; j < N; ++j) row[j] *= inverse;
  }
}

// Half a step: `inverse` = 1 / `total`, the sums of m along its columns (ROWS: rows), weighted by the factors
// `other` of its rows (columns).
template <bool ROWS>
__device__ __forceinline__ void normalise(const float (&m)[N * N], const float (&other)[N], float (&total)[N],
                                          float (&inverse)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    float sum = EPS > 0 ? EPS * total[k] : 0;
#pragma unroll
    for (int l = 0; l < N; ++l) sum = fmaf(m[ROWS ? k * N + l : l * N + k], other[l], sum);
    total[k] = sum;
    inverse[k] = reciprocal(sum);
  }
}

// The way back through `normalise`: takes the cotangent of `inverse`, `d_inverse`, adds to that of `other`, and to g,
// the cotangent of m times m. `d_total` is that of the step that came later.
template <bool ROWS>
__device__ __forceinline__ void normalise_backward(const float (&m)[N * N], const float (&other)[N],
                                                   const float (&inverse)[N], const float (&d_inverse)[N],
                                                   float (&d_total)[N], float (&d_other)[N], float (&g)[N * N]) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const float d = -inverse[k] * (inverse[k] * d_inverse[k]);
    d_total[k] = EPS > 0 ? fmaf(EPS, d_total[k], d) : d;
#pragma unroll
    for (int l = 0; l < N; ++l) {
      const int at = ROWS ? k * N + l : l * N + k;
      const float part = d_total[k] * m[at];
      d_other[l] += part;
      g[at] = fmaf(part, other[l], g[at]);
    }
  }
}

// Takes logits in m and the cotangent d of h_res, and leaves that of the logits in m. The thread's part of `tape`
// begins there and goes on every 32, so that a warp has no conflicts.
template <int ITERATIONS>
__device__ __forceinline__ void project_backward(float (&m)[N * N], const float (&d)[N * N], float4* tape) {
  static_assert(1 <= ITERATIONS && ITERATIONS <= MOST_ITERATIONS, "see above");
  float4* const steps = tape + N * 32;  // a, b, a, b ... a
  float a[N] = {1, 1, 1, 1}, b[N] = {1, 1, 1, 1};
  float g[N * N];
  first_iteration(m, g);
#pragma unroll
  for (int i = 0; i < N; ++i) tape[i * 32] = pack(g + i * N);
  steps[0] = pack(a);
  {
    float row[N] = {1, 1, 1, 1}, column[N] = {1, 1, 1, 1};
#pragma unroll 1
    for (int t = 1; t < ITERATIONS; ++t) {
      normalise<false>(m, a, column, b);
      steps[(2 * t - 1) * 32] = pack(b);
      normalise<true>(m, b, row, a);
      steps[2 * t * 32] = pack(a);
    }
  }
  float da[N] = {}, db[N] = {};
#pragma unroll
  for (int i = 0; i < N; ++i) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float dm = d[i * N + j] * m[i * N + j];
      da[i] = fmaf(dm, b[j], da[i]);
      db[j] = fmaf(dm, a[i], db[j]);
      g[i * N + j] = dm * a[i] * b[j];
    }
  }
  float row[N] = {}, column[N] = {};
#pragma unroll 1
  for (int t = ITERATIONS - 1; t > 0; --t) {
    float before[N];
    take(b, steps[(2 * t - 1) * 32]);
    take(before, steps[(2 * t - 2) * 32]);
    normalise_backward<true>(m, b, a, da, row, db, g);
#pragma unroll
    for (int k = 0; k < N; ++k) da[k] = 0;
    normalise_backward<false>(m, before, b, db, column, da, g);
#pragma unroll
    for (int k = 0; k < N; ++k) a[k] = before[k], db[k] = 0;
  }
  // Back through the first iteration.
  float sum[N] = {}, softmax[N * N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    float v[N];
    take(v, tape[i * 32]);
    const float of_row = g[i * N] + g[i * N + 1] + g[i * N + 2] + g[i * N + 3];
    const float of_softmax = EPS > 0 ? of_row * reciprocal(v[0] + v[1] + v[2] + v[3] + (N + 1) * EPS) : 0;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const int at = i * N + j;
      softmax[at] = v[j];
      m[at] = EPS > 0 ? v[j] * (g[at] * reciprocal(v[j] + EPS) - of_softmax) : fmaf(-m[at], of_row, g[at]);
      sum[j] += m[at];
    }
  }
#pragma unroll
  for (int at = 0; at < N * N; ++at) m[at] = fmaf(-softmax[at], sum[at % N], m[at]);
}

}  // namespace sinkhorn
