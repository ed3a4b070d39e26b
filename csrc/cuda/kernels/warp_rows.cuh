#pragma once

// Kernels that give every row of a matrix to a warp.

#include "cuda/kernels/elements.cuh"
#include "cuda/kernels/warps.cuh"

namespace edl::cuda {

inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / kWarp;

__device__ inline int64_t row_of_warp() {
  return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
}

inline unsigned blocks_for(int64_t rows) {
  return static_cast<unsigned>(divide_up(rows, kWarps));
}

// What a row without a part in it gets.
template <typename Storage>
__device__ inline void fill_row(Storage* row, int64_t length, int lane, Accumulation<Storage> value) {
  for (int64_t c = lane; c < length; c += kWarp) {
    row[c] = narrow<Storage>(value);
  }
}

// Calls `function.template operator()<width>()` with the pack that the rows allow.
template <typename Storage, typename Function>
void with_pack(bool aligned, const Function& function) {
  if (aligned) {
    function.template operator()<kPackWidth<Storage>>();
  } else {
    function.template operator()<1>();
  }
}

} // namespace edl::cuda
