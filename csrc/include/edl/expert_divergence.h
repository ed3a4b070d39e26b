#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>

#include "edl/export.h"

namespace edl {

// The Expert Divergence loss from the domains' moments: with p_d = sums[d] / counts[d] and D_jk the Jensen-Shannon
// divergence of p_j and p_k in nats, the mean over pairs of -log(D_jk + eps) ("mean_of_logs", arXiv 2603.00054), or
// -log(mean of D_jk + eps) ("log_of_mean").
//
// Domains whose count is 0 drop out; with fewer than two left the loss is 0 with zero gradient. `bias_correction`
// leaves the value, and takes the gradient of D_jk less its expectation under equal domains; only domains of two
// segments or more count. Differentiable in `sums` and `squares`. Returns the loss [...], float64.
EDL_API at::Tensor expert_divergence(
    const at::Tensor& sums, //    [..., D, E] float64
    const at::Tensor& squares, // [..., D, E] float64; not read without bias_correction
    const at::Tensor& counts, //  [..., D] float64
    double eps, //                at least 0
    std::string_view reduction,
    bool bias_correction);

} // namespace edl
