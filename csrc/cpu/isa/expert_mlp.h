#pragma once

#include <cstdint>

#include "common/storage_type.h"
#include "cpu/isa/dispatch.h"

namespace edl::cpu {

// ---- sizes of blocks: results do not depend on them ----

inline constexpr int64_t kDepth = 256; //        k of one pass over a block
inline constexpr int64_t kBlockRows = 84; //     rows of A: whole tiles of 6 and of 14 rows
inline constexpr int64_t kActivationColumns =
    64; // columns of I of a task that computes gate and up; all are whole panels
inline constexpr int64_t kWideColumns = 256; //  columns of I where there is one product: fewer gathers of its rows
inline constexpr int64_t kTokenColumns = 128; // columns of H of a task that adds to tokens
inline constexpr int64_t kGradColumns = 256; //  columns of a task over a parameter's gradient, of kBlockRows rows

// ---- what all tasks of one call see ----

// "Storage": the type of tokens; "accumulation type": float, or double for double. Strides are in elements; the last
// dimension is dense everywhere.
struct ExpertMlpTask {
  int64_t hidden_size; //              H
  int64_t intermediate_size; //        I
  int64_t top_k; //               K
  const int32_t* slots; //        [N]
  const void* factors; //         [T, K] accumulation type
  const void* tokens; //          [T, H] storage
  int64_t tokens_stride;
  const void* gate_up; //         [E, 2I, H] storage
  int64_t gate_up_strides[2];
  const void* down; //            [E, H, I] storage
  int64_t down_strides[2];
  void* pre_activation; //        [N, 2I] storage; null where no gradient is wanted
  void* sums; //                  [T, H] accumulation type: output, or gradient of tokens
  void* rows; //                  [N, H] storage: what is kept of the outputs before the weights, or null

  // Backward only.
  const void* grad_output; //     [T, H] storage, or [N, H] in sorted order where Gram matrices have a part in it
  int64_t grad_output_stride;
  const int32_t* grad_slots; //   [N]: row i is row grad_slots[i] / grad_top_k of grad_output
  int64_t grad_top_k;
  const void* grad_activation; // [N, I] accumulation type: further gradient, which the factor does not scale; or null
  const void* zeros; //           [H] storage, all 0
  void* grad_factors; //          [T, K] accumulation type
  void* grad_gate_up; //          [E, 2I, H] storage
  void* grad_down; //             [E, H, I] storage
  // For an expert that windows share, accumulation type; null for float and double, whose gradients carry themselves.
  void* carried_gate_up; //       [2I, H]
  void* carried_down; //          [H, I]

  // Scratch for the rows of one window, accumulation type.
  int64_t window_begin; //        its first row
  int64_t activation_stride;
  int64_t pre_activation_stride;
  void* activation; //            [rows, activation_stride]
  void* grad_pre_activation; //   [rows, pre_activation_stride]
  void* dots; //                  [I / kWideColumns, window_rows]: parts of the gradient of factors
  int64_t window_rows;
};

// Rows of the sorted order that one expert serves.
struct ExpertRows {
  int64_t expert;
  int64_t begin;
  int64_t end;
};

struct Columns {
  int64_t begin;
  int64_t end;
};

// A block of an expert's gradient.
struct GradBlock {
  ExpertRows rows; //  those of this window
  bool continues; //   an earlier window had rows of this expert
  bool ends; //        no later window has
  int64_t row; //      kBlockRows rows of the parameter from here
  int64_t column; //   kGradColumns columns from here
};

// Tasks of one stage may run at once; `own` is the scratch of the thread, aligned to 64 bytes. Indexed by storage.
struct ExpertMlpLoops {
  // Columns of I: pre_activation and activation of the rows.
  void (*activations[kStorageTypes])(const ExpertMlpTask& task, ExpertRows rows, Columns columns, void* own);
  // Columns of H: sums[token] += factor · down activation, expert after expert.
  void (*output[kStorageTypes])(
      const ExpertMlpTask& task, const ExpertRows* experts, int64_t num_experts, Columns columns, void* own);
  // Columns of I: grad_pre_activation and dots of the rows; activation times its factor.
  void (*grad_activations[kStorageTypes])(const ExpertMlpTask& task, ExpertRows rows, Columns columns, void* own);
  // Columns of H: sums[token] += gate_up^T grad_pre_activation, expert after expert.
  void (*grad_tokens[kStorageTypes])(
      const ExpertMlpTask& task, const ExpertRows* experts, int64_t num_experts, Columns columns, void* own);
  // grad_factors of the rows begin..end, from dots.
  void (*grad_factors[kStorageTypes])(const ExpertMlpTask& task, int64_t begin, int64_t end);
  void (*grad_gate_up[kStorageTypes])(const ExpertMlpTask& task, const GradBlock& block, void* own);
  void (*grad_down[kStorageTypes])(const ExpertMlpTask& task, const GradBlock& block, void* own);
};

EDL_ISA_LOOPS(ExpertMlpLoops, expert_mlp_loops)

// Elements of the accumulation type that a thread needs: A [kBlockRows, kDepth], C [kBlockRows, kGradColumns], and the
// panels of B: 256 columns of a parameter, or [kDepth, kGradColumns].
inline int64_t expert_mlp_thread_elements(int64_t hidden_size, int64_t intermediate_size) {
  const int64_t longest = hidden_size > intermediate_size ? hidden_size : intermediate_size;
  return kBlockRows * (kDepth + kGradColumns) + kGradColumns * (longest > kDepth ? longest : kDepth);
}

} // namespace edl::cpu
