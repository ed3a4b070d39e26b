#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "edl/combine_tokens.h"

namespace edl {

void check_combine_tokens(
    const at::Tensor& rows, const std::optional<at::Tensor>& weights, const at::Tensor& row_order, int64_t top_k);

void check_combine_tokens_backward(
    const at::Tensor& grad_output, // [T, H]
    const at::Tensor& rows, //        [N, H]
    const std::optional<at::Tensor>& weights,
    const at::Tensor& row_order,
    int64_t top_k);

} // namespace edl
