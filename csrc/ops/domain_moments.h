#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>
#include <tuple>

#include "edl/domain_moments.h"

// `op`: in whose name it refuses.
namespace edl {

std::tuple<at::Tensor, at::Tensor, at::Tensor> domain_moments_for(
    const at::Tensor& segment_sums, //   [..., S, E]
    const at::Tensor& segment_counts, // [..., S] or [S]
    const at::Tensor& labels, //         [S] or [S, D]
    c10::SymInt num_domains, //          D
    bool squares,
    std::string_view op);

// The gradient to `segment_sums`; no second derivative.
at::Tensor domain_moments_backward(
    const at::Tensor& grad_sums, //      [..., D, E] float64
    const at::Tensor& grad_squares, //   [..., D, E] float64, or 0 elements
    const at::Tensor& segment_sums, //   [..., S, E]
    const at::Tensor& segment_counts, // [..., S] or [S]
    const at::Tensor& labels, //         [S] or [S, D]
    std::string_view op);

void check_domain_moments(
    std::string_view op,
    const at::Tensor& segment_sums,
    const at::Tensor& segment_counts,
    const at::Tensor& labels,
    const c10::SymInt& num_domains);

void check_domain_moments_backward(
    std::string_view op,
    const at::Tensor& grad_sums, //      [..., D, E] float64
    const at::Tensor& grad_squares, //   [..., D, E] float64, or 0 elements
    const at::Tensor& segment_sums, //   [..., S, E]
    const at::Tensor& segment_counts, // [..., S] or [S]
    const at::Tensor& labels); //        [S] or [S, D]

} // namespace edl
