#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>

#include <optional>

// Rules for what sort_by_expert and a router hand on, shared by the operators of the layer. `values_name` is what the
// operator calls the tokens or rows that these belong to.
namespace edl {

// Routing weights [T, K], in the type of the values, or float32 beside 16-bit ones.
void check_routing_weights(
    std::string_view op, const at::Tensor& weights, const at::Tensor& values, const char* values_name);

// A vector of int32 that sort_by_expert gives, row_order or offsets.
void check_sorted_indices(
    std::string_view op,
    const at::Tensor& indices,
    const char* name,
    const at::Tensor& values,
    const char* values_name);

// Rows [N, H] in the order of the experts, K for each token, with or without weights [T, K].
void check_rows_of_tokens(
    std::string_view op,
    const at::Tensor& rows,
    const std::optional<at::Tensor>& weights,
    const at::Tensor& row_order,
    int64_t top_k);

// T of such rows.
c10::SymInt num_tokens_of(const at::Tensor& rows, const std::optional<at::Tensor>& weights, int64_t top_k);

} // namespace edl
