#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace edl::cpu {

// One layer's domains that take part in a pair, as padded rows.
struct DomainMeans {
  std::vector<int64_t> domains; //  [M] their ids
  std::vector<double> counts; //    [M]
  std::vector<double> means; //     [M, width]
  std::vector<double> log_means; // [M, width]
  std::vector<double> variance; //    [M, width] variance of the mean, V/n; empty without bias correction
  int64_t width; //                 E, padded to whole vectors with zeros

  int64_t size() const {
    return static_cast<int64_t>(domains.size());
  }
  const double* mean(int64_t j) const {
    return means.data() + j * width;
  }
  const double* log_mean(int64_t j) const {
    return log_means.data() + j * width;
  }
  const double* variance_of(int64_t j) const {
    return variance.data() + j * width;
  }
};

// Domains of one layer that have segments; with bias correction, two or more, which a variance needs.
DomainMeans domain_means(
    const double* sums, //    [D, E]
    const double* squares, // [D, E]; null without bias correction
    const double* counts, //  [D]
    int64_t num_domains,
    int64_t num_experts);

} // namespace edl::cpu
