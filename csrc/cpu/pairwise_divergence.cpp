// pairwise_divergence on the CPU: moments [L, D, E] → [L, D, D], float64, one task per layer and domain. Cost: D²/2
// pairs of E logarithms per layer.
#include "ops/pairwise_divergence.h"

#include <ATen/Parallel.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include <limits>
#include <vector>

#include "common/tensors.h"
#include "cpu/domain_means.h"
#include "cpu/isa/expert_divergence.h"

namespace edl::cpu {
namespace {

// Row j of one layer's matrix, right of the diagonal, and its mirror.
void fill_row(const DomainMeans& layer, int64_t j, bool bias_correction, int64_t num_domains, double* out) {
  const ExpertDivergenceLoops& loops = expert_divergence_loops();
  std::vector<double> scratch(2 * layer.width);
  const int64_t row = layer.domains[j];
  out[row * num_domains + row] = 0.0;
  for (int64_t k = j + 1; k < layer.size(); ++k) {
    double value = loops.divergence(
        layer.mean(j), layer.mean(k), layer.log_mean(j), layer.log_mean(k), layer.width, nullptr, nullptr);
    if (bias_correction) {
      value -= loops.bias(
          layer.mean(j), layer.mean(k), layer.variance_of(j), layer.variance_of(k), layer.width, scratch.data(),
          scratch.data() + layer.width);
    }
    const int64_t column = layer.domains[k];
    out[row * num_domains + column] = value;
    out[column * num_domains + row] = value;
  }
}

at::Tensor pairwise_divergence_cpu(
    const at::Tensor& sums, const at::Tensor& counts, const std::optional<at::Tensor>& squares) {
  check_pairwise_divergence(sums, counts, squares);
  check_memory("edl::pairwise_divergence", sums, counts, squares);
  const at::Tensor dense_sums = sums.contiguous();
  const at::Tensor dense_squares = squares.has_value() ? squares->contiguous() : at::Tensor();
  const at::Tensor dense_counts = counts.contiguous();
  const int64_t num_domains = sums.size(-2);
  const int64_t num_experts = sums.size(-1);
  at::DimVector shape(sums.sizes().begin(), sums.sizes().end());
  shape.back() = num_domains;
  at::Tensor out = at::full(shape, std::numeric_limits<double>::quiet_NaN(), sums.options());
  const int64_t layers = num_domains == 0 ? 0 : dense_counts.numel() / num_domains;
  const double* sums_data = dense_sums.const_data_ptr<double>();
  const double* squares_data = squares.has_value() ? dense_squares.const_data_ptr<double>() : nullptr;
  const double* counts_data = dense_counts.const_data_ptr<double>();
  double* out_data = out.mutable_data_ptr<double>();
  for (int64_t l = 0; l < layers; ++l) {
    const int64_t offset = l * num_domains * num_experts;
    const DomainMeans layer = domain_means(
        sums_data + offset, squares_data == nullptr ? nullptr : squares_data + offset, counts_data + l * num_domains,
        num_domains, num_experts);
    at::parallel_for(0, layer.size(), 4, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        fill_row(layer, j, squares.has_value(), num_domains, out_data + l * num_domains * num_domains);
      }
    });
  }
  return out;
}

} // namespace
} // namespace edl::cpu

TORCH_LIBRARY_IMPL(edl, CPU, m) {
  m.impl("pairwise_divergence", edl::cpu::pairwise_divergence_cpu);
}
