#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "edl/export.h"

namespace edl {

// The Expert Divergence loss from the domains' moments: with p_d = sums[d] / counts[d] and D_jk the Jensen-Shannon
// divergence of p_j and p_k in nats, the mean over pairs of -log(D_jk + eps) ("mean_of_logs", arXiv 2603.00054), or
// -log(mean of D_jk + eps) ("log_of_mean").
//
// Domains whose count is 0 drop out; with fewer than two left the loss is 0 with zero gradient. `squares` ask for the
// correction of the bias, of "mean_of_logs" only: the value stays, the gradient is that of D_jk less its expectation
// under equal domains, and only domains of two segments or more count. Differentiable in `sums` and `squares`. Returns
// the loss [...], float64.
EDL_API at::Tensor expert_divergence(
    const at::Tensor& sums, //   [..., D, E] float64
    const at::Tensor& counts, // [..., D] float64
    double eps = 1e-6, //        at least 0
    std::string_view reduction = "mean_of_logs",
    const std::optional<at::Tensor>& squares = std::nullopt); // [..., D, E] float64

} // namespace edl
