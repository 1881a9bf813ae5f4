// Backward of a layer input u = h_pre x' and of the mappings of its sublayer, in one launch (n = 4, bfloat16).
//
// A program has TOKENS tokens. The first of its warps goes back from h_post and h_res, one thread a token, which takes
// as long as the 20 iterations of Sinkhorn-Knopp and moves few bytes. The others read rows of x' and d meanwhile, a
// warp a token at a time, and leave sums over the columns:
//
//   <x'_i, d>, which is dh_pre; with NORM <x'_i, w d> and <x'_i, u>, which also give <u, w d> and <u, u>
//
// Behind the only barrier the first warp goes on from these sums, again with one thread a token, and writes what
// backward.cu reads: ds as fragments (`store_fragments` in coefficients/triton_backward.py), kappa, and with NORM
// inverse and kappa_n: the cotangent of u is inverse w d - kappa_n u.
//
// Constants: C; NORM, HC (0 or 1; Hyper-Connections: gates tanh, a norm a stream); LOGITS, -1 for Sinkhorn-Knopp, or as
// many logits in place of h_res (0 to 16); NUM_ITERATIONS, TOKENS, WARPS, PROGRAMS (that a multiprocessor holds),
// SINKHORN_EPS_BITS and NORM_EPS_BITS.
#include "boundary/input_backward_parts.cuh"

// Grid: programs, of which the first has the last tokens: the kernel before wrote d of those last, backward.cu begins
// with the first ones. Both find some of d in L2, since x' is given up first.
// x [T, 4 C]; pre [T, 4]; weights [C]; d [T, C]; s [T, m] (HC: [T, 4, 6]); r [T] (HC: [T, 4]); bias [m], alpha [3];
// dpost [T, 4], dres [T, 16] or [T, LOGITS]; ds [tiles, 3, 32, 4], pairs [tiles, 3, 32, 8] (HC: 4 in place of 3);
// kappa, kappa_pre as r; sums [m + 3, programs]; norm [T, 4]. m is 24 or 8 + LOGITS.
extern "C" __global__ void __launch_bounds__(THREADS, PROGRAMS)
    mhc_read_backward_input(const bf16* x, const float* pre, const float* weights, const bf16* d, const float* s,
                            const float* r, const float* bias, const float* alpha, const float* dpost,
                            const float* dres, int T, float* ds, bf16* pairs, float* kappa, float* kappa_pre,
                            float* sums, float* norm) {
  SHARED_MEMORY(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int program = gridDim.x - 1 - blockIdx.x, first = program * TOKENS;
  float* const of_rows = reinterpret_cast<float*>(shared + ROWS);
  if (warp) {
#pragma unroll 1
    for (int token = first + TOKENS - warp; token >= first; token -= WARPS - 1) {
      if (token < T) row_sums(x, d, weights, pre, token, lane, of_rows + token % TOKENS * SUMS);
    }
    __syncthreads();
    return;
  }

  // A token that does not exist is the first one with cotangents of zero.
  const bool inside = lane < TOKENS && first + lane < T;
  const u32 token = inside ? first + lane : 0;
  Mappings mappings(shared, lane, r, alpha, token);
  mappings.go_back(s, bias, dpost, dres, token, inside);
  if (inside) mappings.store_kappa(kappa, token);
  __syncthreads();

  float dpre[N] = {};
  if (inside) {
    const float* found = of_rows + lane * SUMS;
#pragma unroll
    for (int i = 0; i < N; ++i) dpre[i] = found[i];
    if (NORM) reinterpret_cast<float4*>(norm)[token] = behind_norm(dpre, found + N, pre, token);
  }
  mappings.go_back_from_pre(s, bias, dpre, token);
  if (inside) mappings.store_kappa(kappa_pre, token);
  __syncwarp();
  mappings.store(ds, pairs, sums + program, first / 16, min(TOKENS / 16, (T - first + 15) / 16));
}
