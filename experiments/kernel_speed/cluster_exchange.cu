// Would a forward that keeps whole rows on chip pay, if a cluster of programs shares a tile of tokens?
//
//   nvcc -O3 -std=c++17 -arch=sm_90 experiments/kernel_speed/cluster_exchange.cu -o exchange && ./exchange     (seconds)
//
// A cluster of 8 programs holds 16 tokens, each program an eighth of the columns (n = 4, bfloat16). Behind the write of x'
// the programs add up 34 sums a token (24 of s, 10 inner products of the streams) in distributed shared memory: each
// program gets the parts of 2 tokens, makes h_pre and hands it to the other 7. That takes two barriers of the cluster.
//
// Measured, no arithmetic of mHC in it:
//   barriers   two barriers of the cluster a tile, nothing else
//   exchange   the same with the 34 sums there and h_pre back
//   copy       streams through shared memory: x and y in, x' and u out (10C a token), two tiles, no barrier
//   both       copy, with the exchange between the write of x' and that of u
// The times of "both" against "copy" say what the hand-shake costs beside the memory traffic. A program takes 225,280
// bytes of shared memory as the real one would (phi's slice at C = 2560), so that it has a multiprocessor for itself.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

constexpr int CLUSTER = 8, TOKENS = 16, SUMS = 34, N = 4, THREADS = 512, SHARED_BYTES = 225280;
constexpr int OWN = TOKENS / CLUSTER;  // tokens of a program in the exchange
enum Mode { BARRIERS, EXCHANGE, COPY, BOTH };

void check(cudaError_t error) {
  if (error != cudaSuccess) {
    std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
    std::exit(1);
  }
}

__device__ unsigned rank_in_cluster() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Stores to the same place of another program's shared memory.
__device__ void store_remote(float* place, unsigned rank, float value) {
  unsigned local = static_cast<unsigned>(__cvta_generic_to_shared(place)), remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote), "f"(value) : "memory");
}

__device__ void copy_async_16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(to))),
               "l"(from)
               : "memory");
}

// Parts of the sums to their owners, sums, h_pre to everybody. `parity` because the next tile's parts may come early.
__device__ void exchange(float (*parts)[CLUSTER][OWN * SUMS], float (*pre)[TOKENS * N], unsigned rank, int parity,
                         float value) {
  for (int k = threadIdx.x; k < TOKENS * SUMS; k += THREADS)
    store_remote(&parts[parity][rank][k % (OWN * SUMS)], k / (OWN * SUMS), value + k);
  cluster_barrier();
  const int k = threadIdx.x;
  if (k < CLUSTER * OWN * N) {  // 8 programs x 2 tokens x 4 streams: one store each
    const int to = k / (OWN * N), own = k % (OWN * N);
    float sum = 0;
    for (int from = 0; from < CLUSTER; ++from) sum += parts[parity][from][own / N * SUMS + own % N];
    store_remote(&pre[parity][rank * OWN * N + own], to, 1 / (1 + __expf(-sum)));
  }
  cluster_barrier();
}

template <Mode mode, int C>
__global__ void __cluster_dims__(CLUSTER) __launch_bounds__(THREADS, 1)
    run(const uint4* x, const uint4* y, uint4* mixed, uint4* u, float* sink, int tiles) {
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ float parts[2][CLUSTER][OWN * SUMS];
  __shared__ float pre[2][TOKENS * N];
  const unsigned rank = rank_in_cluster();
  const int clusters = gridDim.x / CLUSTER, first = blockIdx.x / CLUSTER;
  constexpr int row = C / CLUSTER / 8;  // 16-byte chunks of a stream of a token, of this program
  constexpr int chunks = TOKENS * N * row, small = TOKENS * row;
  uint4* tile_of[2] = {reinterpret_cast<uint4*>(shared), reinterpret_cast<uint4*>(shared) + chunks + small};
  const auto place = [&](int tile, int k) {  // of chunk k of x
    const int line = k / row;                // token and stream
    return static_cast<long long>(tile * TOKENS * N + line) * (C / 8) + rank * row + k % row;
  };
  const auto place_small = [&](int tile, int k) {
    return static_cast<long long>(tile * TOKENS + k / row) * (C / 8) + rank * row + k % row;
  };
  const auto load = [&](int tile, int parity) {
    for (int k = threadIdx.x; k < chunks; k += THREADS) copy_async_16(tile_of[parity] + k, x + place(tile, k));
    for (int k = threadIdx.x; k < small; k += THREADS)
      copy_async_16(tile_of[parity] + chunks + k, y + place_small(tile, k));
  };
  constexpr bool copies = mode == COPY || mode == BOTH;
  int parity = 0;
  float found = 0;
  if (copies && first < tiles) load(first, 0);
  asm volatile("cp.async.commit_group;" ::: "memory");
  for (int tile = first; tile < tiles; tile += clusters, parity ^= 1) {
    if (copies) {
      asm volatile("cp.async.wait_group 0;" ::: "memory");
      __syncthreads();
      if (tile + clusters < tiles) load(tile + clusters, parity ^ 1);
      asm volatile("cp.async.commit_group;" ::: "memory");
      for (int k = threadIdx.x; k < chunks; k += THREADS) mixed[place(tile, k)] = tile_of[parity][k];
    }
    if (mode == BARRIERS) cluster_barrier(), cluster_barrier();
    if (mode == EXCHANGE || mode == BOTH) {
      exchange(parts, pre, rank, parity, found);
      found += pre[parity][threadIdx.x % (TOKENS * N)];
    }
    if (copies)
      for (int k = threadIdx.x; k < small; k += THREADS) {
        uint4 value = tile_of[parity][chunks + k];
        if (mode == BOTH) value.x ^= __float_as_uint(pre[parity][k / row * N]);
        u[place_small(tile, k)] = value;
      }
  }
  if (found == 1234567.f) *sink = found;  // keeps it
  cluster_barrier();                      // nobody leaves while others write into its shared memory
}

template <Mode mode, int C>
float microseconds(int clusters, int tiles, const std::vector<uint4*>& a, float* sink) {
  auto* kernel = &run<mode, C>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES));
  cudaEvent_t start, end;
  check(cudaEventCreate(&start)), check(cudaEventCreate(&end));
  std::vector<float> times;
  for (int k = 0; k < 25; ++k) {
    check(cudaEventRecord(start));
    kernel<<<clusters * CLUSTER, THREADS, SHARED_BYTES>>>(a[0], a[1], a[2], a[3], sink, tiles);
    check(cudaEventRecord(end));
    check(cudaEventSynchronize(end));
    float ms;
    check(cudaEventElapsedTime(&ms, start, end));
    if (k >= 5) times.push_back(1e3f * ms);
  }
  check(cudaGetLastError());
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}


template <int C>
void measure(int clusters, int T) {
  std::vector<uint4*> arrays(4);
  const size_t rows = static_cast<size_t>(T) * C * 2;
  const size_t sizes[4] = {N * rows, rows, N * rows, rows};
  for (int k = 0; k < 4; ++k) check(cudaMalloc(&arrays[k], sizes[k])), check(cudaMemset(arrays[k], 1, sizes[k]));
  float* sink;
  check(cudaMalloc(&sink, 4));
  const int tiles = T / TOKENS, of_cluster = (tiles + clusters - 1) / clusters;
  cudaEvent_t start, end;
  check(cudaEventCreate(&start)), check(cudaEventCreate(&end));
  float plain = 1e9;
  for (int k = 0; k < 10; ++k) {  // the card's own copy of as many bytes
    check(cudaEventRecord(start));
    check(cudaMemcpyAsync(arrays[2], arrays[0], sizes[0], cudaMemcpyDeviceToDevice));
    check(cudaMemcpyAsync(arrays[3], arrays[1], sizes[1], cudaMemcpyDeviceToDevice));
    check(cudaEventRecord(end)), check(cudaEventSynchronize(end));
    float ms;
    check(cudaEventElapsedTime(&ms, start, end));
    plain = std::min(plain, 1e3f * ms);
  }
  const float times[4] = {microseconds<BARRIERS, C>(clusters, tiles, arrays, sink),
                          microseconds<EXCHANGE, C>(clusters, tiles, arrays, sink),
                          microseconds<COPY, C>(clusters, tiles, arrays, sink),
                          microseconds<BOTH, C>(clusters, tiles, arrays, sink)};
  std::printf("T %d C %d: the card copies 10C in %.1f us, %.2f us a tile and cluster\n", T, C, plain,
              plain / of_cluster);
  const char* names[4] = {"barriers", "exchange", "copy", "both"};
  for (int k = 0; k < 4; ++k) std::printf("  %-9s %7.1f us, %5.2f us a tile\n", names[k], times[k], times[k] / of_cluster);
  for (auto* array : arrays) check(cudaFree(array));
  check(cudaFree(sink));
}

}  // namespace

int main() {
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0));
  check(cudaFuncSetAttribute(&run<BOTH, 2560>, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES));
  cudaLaunchConfig_t config{};
  config.gridDim = 1024, config.blockDim = THREADS, config.dynamicSmemBytes = SHARED_BYTES;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = CLUSTER, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute, config.numAttrs = 1;
  int clusters = 0;
  check(cudaOccupancyMaxActiveClusters(&clusters, &run<BOTH, 2560>, &config));
  std::printf("%s, %d multiprocessors, %d clusters of %d at a time\n", device.name, device.multiProcessorCount, clusters,
              CLUSTER);
  measure<2560>(clusters, 16384);
  measure<512>(clusters, 16384);
  return 0;
}
