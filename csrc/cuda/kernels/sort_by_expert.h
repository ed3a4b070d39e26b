#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace edl::cuda {

// More experts than this do not fit the shared memory of a block.
int64_t most_experts_to_sort();

struct SortTask {
  const void* experts; //    [N] int32 or int64
  bool experts_are_64_bit;
  int64_t num_slots; //      N, at least 1, below 2^31
  int64_t num_experts; //    E
  int32_t* scratch; //       sort_scratch_size(...) numbers
  int32_t* row_order; //     [N]; -1 for an id outside [0, E]
  int32_t* offsets; //       [E + 1]
};

int64_t sort_scratch_size(int64_t num_slots, int64_t num_experts);
void launch_sort_by_expert(const SortTask& task, cudaStream_t stream);

} // namespace edl::cuda
