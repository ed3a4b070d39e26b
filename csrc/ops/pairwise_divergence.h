#pragma once

#include <ATen/core/Tensor.h>

#include "edl/pairwise_divergence.h"

namespace edl {

void check_pairwise_divergence(
    const at::Tensor& sums, const at::Tensor& counts, const std::optional<at::Tensor>& squares);

} // namespace edl
