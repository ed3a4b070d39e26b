#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "common/scores.h"
#include "edl/route_tokens.h"

namespace edl {

Scores check_route_tokens(
    const at::Tensor& logits,
    int64_t top_k,
    std::string_view scores,
    const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& allowed,
    const std::optional<at::Tensor>& experts);

Scores check_route_tokens_backward(
    const at::Tensor& grad_weights, // [T, K]
    const at::Tensor& logits, //       [T, E]
    const at::Tensor& experts, //      [T, K], int64, or as they were given
    std::string_view scores,
    const std::optional<at::Tensor>& allowed,
    bool given); // whether the experts were

} // namespace edl
