#pragma once

#include <ATen/core/Tensor.h>

#include "cuda/kernels/token_gram.h"

namespace edl::cuda {

// Rows that are dense in their last dimension, as the kernels take them.
TokenRows token_rows(
    const at::Tensor& rows, //        [N, *]
    const at::Tensor& row_of_slot, // [N] int32
    const at::Tensor& weights, //     [T, K] dense, accumulation type, or undefined
    int64_t top_k);

// Gram matrices [T, K, K] in the accumulation type.
at::Tensor grams_of(const at::Tensor& rows, const at::Tensor& row_of_slot, const at::Tensor& weights, int64_t top_k);

} // namespace edl::cuda
