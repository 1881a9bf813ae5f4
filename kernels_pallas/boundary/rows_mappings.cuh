// From the sums of a row to the mappings, for rows_forward.cu: gates, and Sinkhorn-Knopp by one thread a token.
#pragma once
#include "gpu/warp.cuh"

__device__ __forceinline__ float sigmoid(float x) { return 1 / (1 + expf(-x)); }

// A 4 x 4 matrix of one token in registers, and `kernels_pallas.sinkhorn.reference` on it.
struct Matrix {
  float v[4][4];

  template <bool columns>
  __device__ __forceinline__ void normalise(float eps) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float total = (columns ? v[0][k] : v[k][0]) + (columns ? v[1][k] : v[k][1]);
      total += (columns ? v[2][k] : v[k][2]) + (columns ? v[3][k] : v[k][3]);
      // Without an eps a sum is at least 1 / n^2, see `sinkhorn.triton.inverse_sums`.
      const float inverse = reciprocal(total + eps);
#pragma unroll
      for (int l = 0; l < 4; ++l) (columns ? v[l][k] : v[k][l]) *= inverse;
    }
  }

  // The softmax over rows of the log-softmax over columns. With an eps no logarithm is needed.
  __device__ __forceinline__ void first_iteration(float eps) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float most = fmaxf(fmaxf(v[0][j], v[1][j]), fmaxf(v[2][j], v[3][j]));
      float exps[4], total = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i][j] -= most, exps[i] = expf(v[i][j]), total += exps[i];
      const float log_total = logf(total), inverse = reciprocal(total);
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i][j] = eps > 0 ? exps[i] * inverse + eps : v[i][j] - log_total;
    }
    if (!(eps > 0)) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float most = fmaxf(fmaxf(v[i][0], v[i][1]), fmaxf(v[i][2], v[i][3]));
#pragma unroll
        for (int j = 0; j < 4; ++j) v[i][j] = expf(v[i][j] - most);
      }
    }
    normalise<false>(eps);
  }

  __device__ __forceinline__ void project(int iterations, float eps) {
    first_iteration(eps);
#pragma unroll 1
    for (int k = 1; k < iterations; ++k) {
      normalise<true>(eps);
      normalise<false>(eps);
    }
  }
};
