#pragma once

#include <cstdint>

#include "common/storage_type.h"
#include "cpu/isa/dispatch.h"

namespace edl::cpu {

// A token's rows are those of its K slots, of `width` numbers each. "Accumulation type": float, or double for double
// rows. Strides are in elements.
struct TokenRows {
  const void* rows; //           [N, width] storage; or [N, 2 width], the gate's columns first: rows silu(gate) * up
  int64_t rows_stride;
  bool are_gate_and_up;
  const int32_t* row_of_slot; // [T·K]
  int64_t num_used; //           rows from here on belong to nobody and take no part
  const void* weights; //        [T, K] accumulation type, or null; a row of weight 0 takes no part
  int64_t top_k; //              K
  int64_t width;
};

struct TokenGramTask {
  TokenRows tokens;
  void* gram; //                 [T, K, K] accumulation type
};

// With C = grad_gram + its transpose, the gradient of row k is Σ_j C[k, j] row j. `grad_output` adds what
// Σ_k weights[k] · row k, the token's output, has: weights[k] · grad_output.
struct TokenGramGradient {
  TokenRows tokens;
  const void* grad_gram; //      [T, K, K] accumulation type
  const void* grad_output; //    [T, width] storage, or null
  int64_t grad_output_stride;
  void* grad_weights; //         [T, K] accumulation type, with grad_output: <grad_output, row k>; or null
  void* grad_rows; //            [N, width] contiguous
  bool is_accumulated; //        whether grad_rows are of the accumulation type
};

// Indexed by storage; tokens begin..end. `own` is the scratch of the thread, token_gram_bytes of it.
struct TokenGramLoops {
  void (*gram[kStorageTypes])(const TokenGramTask& task, int64_t begin, int64_t end, void* own);
  void (*spread[kStorageTypes])(const TokenGramGradient& task, int64_t begin, int64_t end, void* own);
};

EDL_ISA_LOOPS(TokenGramLoops, token_gram_loops)

// Columns at once, of all of a token's rows.
inline constexpr int64_t kGramColumns = 512;

inline int64_t token_gram_bytes(int64_t top_k) {
  return (top_k * kGramColumns + 2 * top_k * top_k) * static_cast<int64_t>(sizeof(double)) + 64;
}

} // namespace edl::cpu
