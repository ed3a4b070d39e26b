#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "edl/export.h"

namespace edl {

// How alike a token's rows are: gram[t, j, k] = <row of slot t·K + j, row of slot t·K + k>, summed in float32 (float64
// for float64 rows). A row whose weight is exactly 0 takes no part: it is not read, and its entries are 0.
// Differentiable in `rows`. Returns [T, K, K], float32 or float64, T = N / K.
EDL_API at::Tensor token_gram(
    const at::Tensor& rows, //                   [N, H]
    const std::optional<at::Tensor>& weights, // [T, K] in the type of rows, or float32 beside 16-bit rows
    const at::Tensor& row_order, //              [N] int32: the slot t·K + k that stands at each row, each slot once
    int64_t top_k); //                           K

} // namespace edl
