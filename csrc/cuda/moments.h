#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "cuda/device.h"
#include "cuda/kernels/expert_divergence.h"

namespace edl::cuda {

// Moments [..., D, E] as the kernels read them: dense, leading dimensions folded into one.
struct DenseMoments {
  DenseMoments(const at::Tensor& all_sums, const at::Tensor& all_counts, const std::optional<at::Tensor>& all_squares)
      : sums(all_sums.contiguous()),
        squares(all_squares.has_value() ? all_squares->contiguous() : at::Tensor()),
        counts(all_counts.contiguous()) {}

  DomainMoments view() const {
    return {
        .sums = sums.const_data_ptr<double>(),
        .squares = squares.defined() ? squares.const_data_ptr<double>() : nullptr,
        .counts = counts.const_data_ptr<double>(),
        .num_layers = layers_of(sums),
        .num_domains = sums.size(-2),
        .num_experts = sums.size(-1)};
  }

  at::Tensor sums;
  at::Tensor squares;
  at::Tensor counts;
};

} // namespace edl::cuda
