#pragma once

#include <ATen/core/Tensor.h>

#include "edl/export.h"

namespace edl {

// Copies tokens into the order of the experts: row i = tokens[row_order[i] / K]. The slots of sentinels are copied like
// all others; they stand behind offsets[E] of sort_by_expert. Differentiable in `tokens`, to any order: the gradient is
// combine_tokens of the rows' gradient, without weights, so a sentinel row that was not used must get the gradient
// zero. Returns rows [N, H] in the type of tokens, N = T·K.
EDL_API at::Tensor dispatch_tokens(
    const at::Tensor& tokens, //    [T, H]
    const at::Tensor& row_order, // [N] int32: the slot t·K + k that stands at each row, each slot once
    int64_t top_k); //              K

} // namespace edl
