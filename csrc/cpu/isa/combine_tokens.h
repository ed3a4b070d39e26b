#pragma once

#include <cstdint>

#include "common/storage_type.h"
#include "cpu/isa/dispatch.h"

namespace edl::cpu {

// "Accumulation type": float, or double for double rows. Strides are in elements.
struct CombineTask {
  const void* rows; //            [N, H]
  int64_t rows_stride;
  const int32_t* row_of_slot; //  [T·K]
  const void* weights; //         [T, K] accumulation type
  int64_t top_k; //               K
  int64_t width; //               H
  void* output; //                [T, H] contiguous
};

struct CombineGradient {
  const void* grad_output; //     [T, H]
  int64_t grad_output_stride;
  const void* rows; //            [N, H]; read for grad_weights only
  int64_t rows_stride;
  const int32_t* row_of_slot; //  [T·K]
  const void* weights; //         [T, K] accumulation type
  int64_t top_k; //               K
  int64_t width; //               H
  void* grad_rows; //             [N, H] contiguous, or null
  void* grad_weights; //          [T, K] accumulation type, or null
};

// Indexed by storage; tokens begin..end.
struct CombineTokensLoops {
  void (*combine[kStorageTypes])(const CombineTask& task, int64_t begin, int64_t end);
  void (*spread[kStorageTypes])(const CombineGradient& task, int64_t begin, int64_t end);
};

EDL_ISA_LOOPS(CombineTokensLoops, combine_tokens_loops)

} // namespace edl::cpu
