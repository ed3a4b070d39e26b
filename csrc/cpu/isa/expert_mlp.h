#pragma once

#include <cstdint>

#include "common/storage_type.h"
#include "cpu/isa/dispatch.h"

namespace edl {

// The rows of one expert, n of them. "Storage": the type of tokens; "accumulation type": float, or double for double.
struct SwigluTask {
  const void* pre_activation; //  [n, 2I] storage: gate, up
  int64_t width; //               I
  void* activation; //            [n, I] storage
};

struct SwigluGradient {
  const void* pre_activation; //  [n, 2I] storage
  const void* grad_activation; // [n, I] storage, of the row before its weight
  const int32_t* slots; //        [n]
  const void* weights; //         [T, K] accumulation type
  int64_t width; //               I
  void* activation; //            [n, I] storage, times the weight
  void* grad_pre_activation; //   [n, 2I] storage
  void* grad_weights; //          [T, K] accumulation type
};

struct AddRowsTask {
  const void* rows; //            [n, H] storage
  int64_t num_rows; //            n
  const int32_t* slots; //        [n]
  int64_t top_k; //               K
  const void* weights; //         [T, K] accumulation type, or null: 1
  int64_t width; //               H
  void* sums; //                  [T, H] accumulation type
};

// Indexed by storage.
struct ExpertMlpLoops {
  void (*swiglu[kStorageTypes])(const SwigluTask& task, int64_t begin_row, int64_t end_row);
  void (*swiglu_backward[kStorageTypes])(const SwigluGradient& task, int64_t begin_row, int64_t end_row);
  // sums[token of row] += weight · row, for a range of columns: tokens may repeat among the rows, columns do not.
  void (*add_rows[kStorageTypes])(const AddRowsTask& task, int64_t begin_column, int64_t end_column);
};

EDL_ISA_LOOPS(ExpertMlpLoops, expert_mlp_loops)

} // namespace edl
