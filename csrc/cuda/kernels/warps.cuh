#pragma once

// Sums and maxima over the lanes of a warp or the threads of a block, in an order that depends on their number alone.

#include <cstdint>

#include "common/cuda_launch.h"

namespace edl::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

// A team is `lanes` neighbouring lanes of a warp, a power of two. All 32 lanes of the warp call; each gets its team's
// result, the same bits in every lane.
template <typename Scalar>
__device__ inline Scalar team_sum(Scalar x, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, step);
  }
  return x;
}

// NaN is skipped while there is another number: a NaN shows in the sum that follows.
template <typename Scalar>
__device__ inline Scalar team_max(Scalar x, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) {
    const Scalar other = __shfl_xor_sync(kAllLanes, x, step);
    x = other > x || x != x ? other : x;
  }
  return x;
}

// Sum over the threads before this one, and over all of them. `scratch` holds a number per warp; all threads call.
__device__ inline int block_exclusive_sum(int x, int* scratch, int* total) {
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  int inclusive = x;
  for (int step = 1; step < kWarp; step *= 2) {
    const int before = __shfl_up_sync(kAllLanes, inclusive, step);
    inclusive += lane >= step ? before : 0;
  }
  __syncthreads(); // scratch may still be read from the last call
  if (lane == kWarp - 1) {
    scratch[warp] = inclusive;
  }
  __syncthreads();
  int before_warp = 0;
  int all = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) {
    before_warp += w < warp ? scratch[w] : 0;
    all += scratch[w];
  }
  *total = all;
  return before_warp + inclusive - x;
}

// Sum over all threads of a block, for every thread. `scratch` holds a number per warp; all threads call.
template <typename Scalar>
__device__ inline Scalar block_sum(Scalar x, Scalar* scratch) {
  x = team_sum(x, kWarp);
  __syncthreads(); // scratch may still be read from the last call
  if (threadIdx.x % kWarp == 0) {
    scratch[threadIdx.x / kWarp] = x;
  }
  __syncthreads();
  Scalar total = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) {
    total += scratch[w];
  }
  return total;
}

} // namespace edl::cuda
