#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "edl/token_gram.h"

namespace edl {

void check_token_gram(
    const at::Tensor& rows, const std::optional<at::Tensor>& weights, const at::Tensor& row_order, int64_t top_k);

void check_token_gram_backward(
    const at::Tensor& grad_gram, // [T, K, K]
    const at::Tensor& rows, //      [N, H]
    const std::optional<at::Tensor>& weights,
    const at::Tensor& row_order,
    int64_t top_k);

} // namespace edl
