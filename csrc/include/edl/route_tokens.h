#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "edl/export.h"

namespace edl {

// Chooses top_k experts for each token and gives them weights.
//
// Without `bias` the experts with the highest logits are chosen (the order of the scores, without their rounding); with
// it, those with the highest score + bias, where a softmax score is a probability over all experts. Ties go to the
// lowest expert; NaN counts as highest, so that it reaches the weights. `bias` never enters a weight. A weight is the
// score, divided by the sum of the token's chosen scores if `normalize` (sigmoid: sum + 1e-20), times `scale`.
// Differentiable in `logits` through the chosen weights.
//
// An expert that `allowed` forbids a token takes no part, whatever its logit and its bias: it is not chosen, a softmax
// runs over the others alone, its logit's gradient is 0. Each token needs top_k allowed experts.
//
// `experts` are weighed in the place of a choice, and `bias` has no say; -1 is none, of weight 0, and is returned as E.
// Those of a token must differ, and must be allowed; the others need not be top_k then.
// Returns weights [T, K], float32, or float64 for float64 logits, and experts [T, K] int64, best first.
EDL_API std::tuple<at::Tensor, at::Tensor> route_tokens(
    const at::Tensor& logits, //             [T, E]
    int64_t top_k, //                        K, in [1, E]
    std::string_view scores, //              "softmax" or "sigmoid"
    const std::optional<at::Tensor>& bias = std::nullopt, // [E]
    bool normalize = true,
    double scale = 1.0,
    const std::optional<at::Tensor>& allowed = std::nullopt, //  [T, E] bool
    const std::optional<at::Tensor>& experts = std::nullopt); // [T, K] int32 or int64, in [-1, E)

} // namespace edl
