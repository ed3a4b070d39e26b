#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/kernels/storage.h"

namespace edl::cuda {

// The rows of T tokens, K each. A slot's row is that of row_of_slot (kernels/rows.h): where it is kNoExpert, or the
// weight 0, the row takes no part; where it is kUnknown it is NaN.
struct TokenRows {
  const void* rows; //           [N, width]
  StorageType storage;
  int64_t rows_stride; //        elements
  const int32_t* row_of_slot; // [N]
  const void* weights; //        [T, K] accumulation type, or null: all take part
  int64_t num_tokens; //         T, at least 1
  int64_t top_k; //              K
  int64_t width; //              at least 1
};

struct TokenGramTask {
  TokenRows tokens;
  void* gram; //                 [T, K, K] accumulation type: <row j, row k>
};

void launch_token_gram(const TokenGramTask& task, cudaStream_t stream);

// With C = grad_gram + its transpose, grad_rows[row k] = Σ_j C[k, j] · row j. `grad_output` adds what Σ_k weights[k] ·
// row k, the token's output, has: weights[k] · grad_output.
struct TokenGramGradient {
  TokenRows tokens;
  const void* grad_gram; //      [T, K, K] accumulation type
  const int32_t* row_order; //   [N]
  const int32_t* num_used; //    on the device: rows from here on become zeros; null: all count
  const void* grad_output; //    [T, width], or null
  int64_t grad_output_stride; // elements
  void* grad_weights; //         [T, K] accumulation type, with grad_output: <grad_output, row k>; or null
  void* grad_rows; //            [N, width] contiguous
};

// Slots that row_order does not name keep what grad_weights holds.
void launch_token_gram_backward(const TokenGramGradient& gradient, cudaStream_t stream);

} // namespace edl::cuda
