#pragma once

#include <cuda_runtime_api.h>

namespace edl_tests {

// Each does one thing that a kernel must not do; `none` does the same rightly.
enum class Mistake {
  none,
  no_barrier,
  no_warp_barrier,
  write_of_two_blocks,
  read_of_uninitialised_shared,
  read_of_uninitialised_output,
  write_of_input,
  barrier_in_a_branch,
  shuffle_without_a_lane,
  return_before_barrier,
  past_the_end,
  past_shared_memory
};

// out[i] = in[255 - i] of each 256, in[i ^ 1] twice on the way.
void launch_reverse(const int* in, int* out, int blocks, Mistake mistake);

} // namespace edl_tests
