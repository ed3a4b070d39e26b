#pragma once

// What launches over the layers of a routing share.

#include "cuda/kernels/score_rows.cuh"

namespace edl::cuda {

inline constexpr int kThreads = 256;
inline constexpr int kMostLayers = 32; // of a launch

// Calls `function.template operator()<width, packs>()`: a lane holds 16 columns of a row in packs of 16 bytes where
// length and alignment allow it, so a team of 8 lanes holds 128 columns. float64 is for checking and has one form.
template <typename Storage, typename Function>
void with_tile(bool aligned, int64_t num_experts, const Function& function) {
  constexpr int width = kPackWidth<Storage>;
  if constexpr (sizeof(Storage) < 8) {
    if (aligned && num_experts % width == 0) {
      return function.template operator()<width, 16 / width>();
    }
  }
  return function.template operator()<1, 4>();
}

// Calls `function(first, count)` for all layers, at most `at_once` of them each time.
template <typename Function>
void in_groups(int64_t num_layers, int64_t at_once, const Function& function) {
  for (int64_t first = 0; first < num_layers; first += at_once) {
    function(first, num_layers - first < at_once ? num_layers - first : at_once);
  }
}

} // namespace edl::cuda
