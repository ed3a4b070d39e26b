#pragma once

#include <ATen/core/Tensor.h>

#include "edl/export.h"

namespace edl {

// The Jensen-Shannon divergence of every pair of domains, in nats. A diagnostic: it has no gradient.
//
// With `bias_correction` its expectation under equal domains is subtracted; the difference may be negative. NaN where a
// domain has no segment, or with bias_correction fewer than two. Returns [..., D, D], float64, 0 on the diagonal.
EDL_API at::Tensor pairwise_divergence(
    const at::Tensor& sums, //    [..., D, E] float64
    const at::Tensor& squares, // [..., D, E] float64; not read without bias_correction
    const at::Tensor& counts, //  [..., D] float64
    bool bias_correction);

} // namespace edl
