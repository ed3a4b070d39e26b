#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "common/scores.h"
#include "edl/route_tokens.h"

namespace edl {

Scores check_route_tokens(
    const at::Tensor& logits, int64_t top_k, std::string_view scores, const std::optional<at::Tensor>& bias);

Scores check_route_tokens_backward(
    const at::Tensor& grad_weights, // [T, K]
    const at::Tensor& logits, //       [T, E]
    const at::Tensor& experts, //      [T, K]
    std::string_view scores);

} // namespace edl
