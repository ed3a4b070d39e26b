#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "edl/expert_divergence.h"

// `op`: in whose name it refuses.
namespace edl {

at::Tensor expert_divergence_for(
    const at::Tensor& sums,
    const at::Tensor& counts,
    double eps,
    std::string_view reduction,
    const std::optional<at::Tensor>& squares,
    std::string_view op);

// The loss [...], and its gradients to `sums` and `squares` (no element without them).
std::tuple<at::Tensor, at::Tensor, at::Tensor> expert_divergence_with_gradient(
    const at::Tensor& sums,
    const at::Tensor& counts,
    double eps,
    std::string_view reduction,
    const std::optional<at::Tensor>& squares,
    std::string_view op);

enum class PairReduction { mean_of_logs, log_of_mean };

PairReduction parse_pair_reduction(std::string_view op, const char* argument, std::string_view reduction);

void check_eps(std::string_view op, double eps);

PairReduction check_expert_divergence(
    std::string_view op,
    const at::Tensor& sums,
    const at::Tensor& counts,
    double eps,
    std::string_view reduction,
    const std::optional<at::Tensor>& squares);

// Shapes and dtypes of moments [..., D, E], as domain_moments returns them.
void check_moments(
    std::string_view op, const at::Tensor& sums, const at::Tensor& counts, const std::optional<at::Tensor>& squares);

} // namespace edl
