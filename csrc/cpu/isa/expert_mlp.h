#pragma once

#include <cstddef>
#include <cstdint>

#include "common/storage_type.h"
#include "cpu/isa/dispatch.h"

namespace edl::cpu {

// Columns of I that one task of grad_activations takes at most: as many share one part of the gradient of factors.
inline constexpr int64_t kWideColumns = 256;
inline constexpr int64_t kTokenColumns = 128; // columns of H of a task that adds to tokens

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

  int64_t window_begin; //        its first row
  int64_t window_rows; //         the most rows of a window

  // Scratch for the rows of one window, as `lay_out` has placed it: of the accumulation type, or packed for tiles.
  void* dots; //                  [I / kWideColumns, window_rows]: parts of the gradient of factors
  void* activation; //            [rows, activation_stride]; packed: for `output`
  int64_t activation_stride;
  void* grad_pre_activation; //   [rows, pre_activation_stride]
  int64_t pre_activation_stride;
  // Tiles alone; what each holds stands in tiles/expert_mlp.cpp.
  void* packed_tokens;
  void* grad_output_rows;
  void* grad_output_columns;
  void* grad_pre_activation_columns;
  void* token_pairs;
  void* activation_pairs;
};

// Rows of the sorted order that one expert serves.
struct ExpertRows {
  int64_t expert;
  int64_t begin;
  int64_t end;
  int64_t place; // of the first in the window's scratch
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
  int64_t row; //      `grad_rows` rows of the parameter from here
  int64_t column; //   `grad_columns` columns from here
};

// How work is cut. Results do not depend on it, as long as windows cut an expert at multiples of row_unit.
struct ExpertMlpCut {
  int64_t row_unit; //           scratch rounds an expert's rows up to a multiple of it
  int64_t task_rows; //          rows of an expert of one task: it reads its part of a parameter for so many
  int64_t activation_columns; // columns of I of a task that computes gate and up
  int64_t grad_rows; //          of a task over a parameter's gradient
  int64_t grad_columns;
  int64_t thread_bytes; //       the scratch of a thread
};

// Which passes a window's scratch serves.
struct ExpertMlpPasses {
  bool forward;
  bool backward;
};

// The loops of one storage type. Tasks of one stage may run at once; `own` is the scratch of the thread, aligned to 64
// bytes.
struct ExpertMlpLoops {
  ExpertMlpCut (*cut)(int64_t hidden_size, int64_t intermediate_size);
  // Places the scratch of windows of at most `window_rows` rows, a multiple of row_unit, in memory aligned to 64 bytes;
  // returns its bytes. Without memory it only counts.
  size_t (*lay_out)(ExpertMlpTask& task, int64_t window_rows, ExpertMlpPasses passes, char* memory);

  // Around all tasks of a thread in a parallel region, with 64 bytes to keep what was found; null where nothing is set.
  void (*enter)(void* found);
  void (*leave)(const void* found);

  // Packs what `activations` reads of the tokens; null where it gathers for itself.
  void (*gather_tokens)(const ExpertMlpTask& task, ExpertRows rows, void* own);
  // Columns of I: pre_activation and activation of the rows.
  void (*activations)(const ExpertMlpTask& task, ExpertRows rows, Columns columns, void* own);
  // Columns of H: sums[token] += factor · down activation, expert after expert.
  void (*output)(const ExpertMlpTask& task, const ExpertRows* experts, int64_t num_experts, Columns columns, void* own);

  // Packs what the backward pass reads of tokens and grad_output; null where it gathers for itself.
  void (*gather_gradients)(const ExpertMlpTask& task, ExpertRows rows, void* own);
  // Columns of I: grad_pre_activation and dots of the rows; activation times its factor.
  void (*grad_activations)(const ExpertMlpTask& task, ExpertRows rows, Columns columns, void* own);
  // Columns of H: sums[token] += gate_up^T grad_pre_activation, expert after expert.
  void (*grad_tokens)(
      const ExpertMlpTask& task, const ExpertRows* experts, int64_t num_experts, Columns columns, void* own);
  // grad_factors of the rows begin..end, from dots.
  void (*grad_factors)(const ExpertMlpTask& task, int64_t begin, int64_t end);
  void (*grad_gate_up)(const ExpertMlpTask& task, const GradBlock& block, void* own);
  void (*grad_down)(const ExpertMlpTask& task, const GradBlock& block, void* own);
};

struct ExpertMlpTable {
  ExpertMlpLoops of[kStorageTypes];
};

EDL_ISA_LOOPS(ExpertMlpTable, expert_mlp_loops)

#if defined(EDL_WITH_AMX)
namespace avx512_amx {
extern const ExpertMlpLoops expert_mlp_tiles; // of bfloat16
}
#endif

} // namespace edl::cpu
