#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "edl/expert_mlp.h"

namespace edl {

// What the forward pass gives: output [T, H], pre_activation [N, 2I], rows [N, H], output_gram and activation_gram [T, K,
// K]. The last three have no element where they are not asked for.
using ExpertMlpResults = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// To tokens, weights, gate_up and down; what is not needed has no element.
using ExpertMlpGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// In whose name errors speak: both operators have the same kernels.
const char* expert_mlp_name(bool with_gram);

void check_expert_mlp(
    const char* op,
    const at::Tensor& tokens,
    const at::Tensor& weights,
    const at::Tensor& row_order,
    const at::Tensor& offsets,
    const at::Tensor& gate_up,
    const at::Tensor& down);

void check_expert_mlp_backward(
    const at::Tensor& grad_output, //    [T, H]
    const std::optional<at::Tensor>& grad_output_gram, //     [T, K, K]; needs rows
    const std::optional<at::Tensor>& grad_activation_gram, // [T, K, K]
    const at::Tensor& tokens,
    const at::Tensor& weights,
    const at::Tensor& row_order,
    const at::Tensor& offsets,
    const at::Tensor& gate_up,
    const at::Tensor& down,
    const std::optional<at::Tensor>& pre_activation, // [N, 2I], rows in sorted order; none: computed again, and rows
    const std::optional<at::Tensor>& rows); // [N, H] in sorted order, before the weights; with grad_output_gram

// Whether the products of CUDA tensors wait for the device, by types and sizes alone, which may be symbolic. Without a
// CUDA build nobody tells, and they count as waiting.
using ProductsWait = bool (*)(const at::Tensor& gate_up, const at::Tensor& down);
void tell_whether_products_wait(ProductsWait products_wait);

} // namespace edl
