#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>
#include <tuple>
#include <vector>

#include "common/scores.h"
#include "edl/aggregate_routing.h"

// `op`: in whose name it refuses.
namespace edl {

std::tuple<at::Tensor, at::Tensor> aggregate_routing_for(
    const at::Tensor& routing, //     [T, E]
    const at::Tensor& segment_ids, // [T]
    c10::SymInt num_segments, //      S
    std::string_view scores,
    std::string_view op);

// The gradient to `routing`; no second derivative.
at::Tensor aggregate_routing_backward(
    const at::Tensor& grad_sums, //   [S, E]
    const at::Tensor& routing, //     [T, E]
    const at::Tensor& segment_ids, // [T]
    std::string_view scores,
    std::string_view op);

// The same for several layers of one shape, type and device, on CUDA in one launch; below autograd. Returns sums [L, S,
// E] and counts [S].
std::tuple<at::Tensor, at::Tensor> aggregate_layers(
    at::TensorList layers, //         L times [T, E]
    const at::Tensor& segment_ids, // [T]
    c10::SymInt num_segments, //      S
    std::string_view scores,
    std::string_view op);

// The gradient to each layer.
std::vector<at::Tensor> aggregate_layers_backward(
    const at::Tensor& grad_sums, //   [L, S, E]
    at::TensorList layers, //         L times [T, E]
    const at::Tensor& segment_ids, // [T]
    std::string_view scores,
    std::string_view op);

void check_layers_alike(std::string_view op, at::TensorList layers);

Scores check_aggregate_routing(
    std::string_view op,
    const at::Tensor& routing,
    const at::Tensor& segment_ids,
    const c10::SymInt& num_segments,
    std::string_view scores);

Scores check_aggregate_routing_backward(
    std::string_view op,
    const at::Tensor& grad_sums, //   [S, E]
    const at::Tensor& routing, //     [T, E]
    const at::Tensor& segment_ids, // [T]
    std::string_view scores);

} // namespace edl
