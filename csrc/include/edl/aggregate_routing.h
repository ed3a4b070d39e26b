#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>
#include <tuple>

#include "edl/export.h"

namespace edl {

// Sums the router's distribution over the tokens of each segment.
//
// Differentiable in `routing`. `scores`: "softmax", "sigmoid" (normalised over experts), "none" (already
// probabilities). Returns sums [S, E] and counts [S] (tokens), float32, or float64 for float64 input.
EDL_API std::tuple<at::Tensor, at::Tensor> aggregate_routing(
    const at::Tensor& routing, //     [T, E] logits or probabilities
    const at::Tensor& segment_ids, // [T] int32 or int64, in [-1, S); -1 = not counted
    c10::SymInt num_segments, //      S
    std::string_view scores);

} // namespace edl
