#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "edl/export.h"

namespace edl {

// The Jensen-Shannon divergence of every pair of domains, in nats. A diagnostic: it has no gradient.
//
// With `squares` its expectation under equal domains is subtracted; the difference may be negative. NaN where a domain
// has no segment, or with squares fewer than two. Returns [..., D, D], float64, 0 on the diagonal.
EDL_API at::Tensor pairwise_divergence(
    const at::Tensor& sums, //   [..., D, E] float64
    const at::Tensor& counts, // [..., D] float64
    const std::optional<at::Tensor>& squares = std::nullopt); // [..., D, E] float64

} // namespace edl
