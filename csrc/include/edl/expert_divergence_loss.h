#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>

#include "edl/export.h"

namespace edl {

// The Expert Divergence loss of the routing of L layers: aggregate_routing, domain_moments and expert_divergence as one
// step of autograd, and the mean over the layers (`layer_reduction` "mean"), their sum ("sum") or each ("none").
//
// `sequence_reduction` "sequence" gives every segment the same weight in its domain. With "token" the segments are the
// domains, so that every token has it: num_segments is num_domains, and labels are not read. `bias_correction` is that
// of expert_divergence with squares; it needs "sequence", "mean_of_logs" and labels [S]. Differentiable in `layers`.
// Returns a scalar, or [L] with "none", float32, or float64 for float64 layers.
EDL_API at::Tensor expert_divergence_loss(
    at::TensorList layers, //         L times [T, E] or [B, S_len, E], logits or probabilities, all alike
    const at::Tensor& segment_ids, // [T] int32 or int64, in [-1, S); -1 = not counted
    c10::SymInt num_segments, //      S
    const at::Tensor& labels, //      [S] int32 or int64 in [-1, D), -1 = not counted; or [S, D] weights of at least 0
    c10::SymInt num_domains, //       D, at least 2
    double eps = 1e-6, //             at least 0
    std::string_view scores = "softmax", // "softmax", "sigmoid", or "none" for probabilities
    std::string_view sequence_reduction = "sequence",
    std::string_view pair_reduction = "mean_of_logs", // or "log_of_mean"
    std::string_view layer_reduction = "mean",
    bool bias_correction = false);

} // namespace edl
