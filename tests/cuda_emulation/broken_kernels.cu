// A kernel of 256 threads with every mistake that the emulation is there to find.
#include "broken_kernels.h"

#include "common/cuda_launch.h"

namespace edl_tests {
namespace {

constexpr int kThreads = 256;
constexpr unsigned kAllLanes = 0xffffffffu;

__global__ void __launch_bounds__(kThreads) reverse(const int* in, int* out, Mistake mistake) {
  __shared__ int values[kThreads];
  EDL_DYNAMIC_SHARED(int, pairs); // [256]
  const int i = threadIdx.x;
  const int at = blockIdx.x * kThreads + i;
  if (mistake == Mistake::return_before_barrier && i == 7) {
    return;
  }
  pairs[mistake == Mistake::past_shared_memory ? i + 1 : i] = in[at];
  if (mistake != Mistake::no_warp_barrier) {
    __syncwarp();
  }
  int value = pairs[i ^ 1];
  if (mistake != Mistake::shuffle_without_a_lane || i != 40) {
    value = __shfl_xor_sync(kAllLanes, value, 1);
  }
  if (mistake != Mistake::read_of_uninitialised_shared || i != 3) {
    values[i] = value;
  }
  if (mistake == Mistake::barrier_in_a_branch && i % 2 == 0) {
    __syncthreads();
  } else if (mistake != Mistake::no_barrier) {
    __syncthreads();
  }
  value = values[kThreads - 1 - i];
  if (mistake == Mistake::read_of_uninitialised_output) {
    value += out[at];
  }
  if (mistake == Mistake::write_of_input) {
    const_cast<int*>(in)[at] = value;
  }
  out[mistake == Mistake::write_of_two_blocks ? i : mistake == Mistake::past_the_end ? at + 1 : at] = value;
}

} // namespace

void launch_reverse(const int* in, int* out, int blocks, Mistake mistake) {
  EDL_LAUNCH(reverse, blocks, kThreads, kThreads * sizeof(int), nullptr, in, out, mistake);
}

} // namespace edl_tests
