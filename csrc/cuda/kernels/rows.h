#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/kernels/storage.h"

namespace edl::cuda {

// Rows of one width between the order of the tokens and the order of the experts. Slot t * K + k is token t's k-th
// choice; row_order names the slot that stands at each of the N rows, -1 none.

// row_of_slot[row_order[i]] = i; kNoExpert for the rows i from *num_used on. Slots that row_order does not name keep
// what row_of_slot holds.
inline constexpr int32_t kNoExpert = -2; // contributes zeros
inline constexpr int32_t kUnknown = -1; //  contributes NaN

void launch_invert(
    const int32_t* row_order, // [N]
    int64_t num_rows, //         N
    const int32_t* num_used, //  on the device; null: all
    int32_t* row_of_slot, //     [N]
    cudaStream_t stream);

struct GatherTask {
  const void* tokens; //       [T, H]
  StorageType storage;
  int64_t tokens_stride; //    elements
  const int32_t* row_order; // [N]
  int64_t num_rows; //         N, at least 1
  const int32_t* num_used; //  on the device: rows from here on become zeros; null: all are copied
  int64_t top_k; //            K
  int64_t width; //            H, at least 1
  void* rows; //               [N, H] contiguous
  const void* weights = nullptr; // [T, K] accumulation type: rows of weight 0 become zeros; null: none does
};

// rows[i] = tokens[row_order[i] / K]; NaN where row_order names no slot.
void launch_gather(const GatherTask& task, cudaStream_t stream);

struct CombineTask {
  const void* rows; //           [N, H]
  StorageType storage;
  int64_t rows_stride; //        elements
  const int32_t* row_of_slot; // [N]
  const void* weights; //        [T, K] accumulation type, or null: ones
  int64_t num_tokens; //         T, at least 1
  int64_t top_k; //              K
  int64_t width; //              H, at least 1
  void* output; //               [T, H] contiguous
  bool already_weighted = false; // the weights are in the rows, and only tell which of them to leave out
};

// output[t] = Σ_k weights[t, k] · rows[row_of_slot[t K + k]], in the order of k; a row of weight 0 is not read.
void launch_combine(const CombineTask& task, cudaStream_t stream);

struct CombineGradient {
  const void* grad_output; //     [T, H]
  StorageType storage;
  int64_t grad_output_stride; //  elements
  const void* rows; //            [N, H]; not read without grad_weights
  int64_t rows_stride; //         elements
  const int32_t* row_order; //    [N]
  const void* weights; //         [T, K] accumulation type, or null: ones
  int64_t num_rows; //            N, at least 1
  int64_t top_k; //               K
  int64_t width; //               H, at least 1
  void* grad_rows; //             [N, H] contiguous, or null
  void* grad_weights; //          [T, K] accumulation type, or null
};

// grad_rows[i] = weight · grad_output[t], grad_weights[slot] = <grad_output[t], rows[i]> for the slot and token of row
// i.
void launch_combine_backward(const CombineGradient& gradient, cudaStream_t stream);

} // namespace edl::cuda
