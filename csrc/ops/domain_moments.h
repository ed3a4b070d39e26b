#pragma once

#include <ATen/core/Tensor.h>

#include "edl/domain_moments.h"

namespace edl {

// The gradient to `segment_sums`; no second derivative.
at::Tensor domain_moments_backward(
    const at::Tensor& grad_sums, //      [..., D, E] float64
    const at::Tensor& grad_squares, //   [..., D, E] float64, or 0 elements
    const at::Tensor& segment_sums, //   [..., S, E]
    const at::Tensor& segment_counts, // [..., S] or [S]
    const at::Tensor& labels); //        [S] or [S, D]

void check_domain_moments(
    const at::Tensor& segment_sums,
    const at::Tensor& segment_counts,
    const at::Tensor& labels,
    const c10::SymInt& num_domains);

void check_domain_moments_inputs_without_gradient(const at::Tensor& segment_counts, const at::Tensor& labels);

void check_domain_moments_backward(
    const at::Tensor& grad_sums, //      [..., D, E] float64
    const at::Tensor& grad_squares, //   [..., D, E] float64, or 0 elements
    const at::Tensor& segment_sums, //   [..., S, E]
    const at::Tensor& segment_counts, // [..., S] or [S]
    const at::Tensor& labels); //        [S] or [S, D]

} // namespace edl
