#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "edl/export.h"

namespace edl {

// Sums the segments' mean distributions over the domains: with x_s = segment_sums[s] / segment_counts[s] over segments
// that have tokens, sums[d] = Σ w_sd x_s, squares[d] = Σ w_sd x_s² and counts[d] = Σ w_sd.
//
// Differentiable in `segment_sums`. Returns sums and squares [..., D, E] (squares has no element unless asked for) and
// counts [..., D], all float64: they are small, and variances are differences.
EDL_API std::tuple<at::Tensor, at::Tensor, at::Tensor> domain_moments(
    const at::Tensor& segment_sums, //   [..., S, E] float32 or float64
    const at::Tensor& segment_counts, // [..., S], or [S] shared by all
    const at::Tensor&
        labels, //         [S] int32 or int64 in [-1, D), -1 = not counted; or [S, D] weights of at least 0
    c10::SymInt num_domains, //          D
    bool squares);

} // namespace edl
