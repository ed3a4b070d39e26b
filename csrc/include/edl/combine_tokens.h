#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "edl/export.h"

namespace edl {

// Brings rows back to their tokens: output[t] = sum over k of weights[t, k] · (the row of slot t·K + k), summed in
// float32 (float64 for float64 rows) in the order of k; without `weights` a plain sum. A row whose weight is exactly 0
// is not read:
// give the slots of sentinels the weight 0, or their rows zeros. Differentiable in `rows` and `weights`; without
// weights the gradient is dispatch_tokens, to any order.
// Returns [T, H] in the type of rows, T = N / K.
EDL_API at::Tensor combine_tokens(
    const at::Tensor& rows, //                   [N, H]
    const std::optional<at::Tensor>& weights, // [T, K] in the type of rows, or float32 beside 16-bit rows
    const at::Tensor& row_order, //              [N] int32: the slot t·K + k that stands at each row, each slot once
    int64_t top_k); //                           K

} // namespace edl
