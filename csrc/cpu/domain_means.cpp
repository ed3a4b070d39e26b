// Means and variances of the domains of one layer, float64. With x the segments' distributions: mean = Σx / n, unbiased
// variance V = (Σx² - (Σx)²/n) / (n - 1).
#include "cpu/domain_means.h"

#include <algorithm>

#include "cpu/isa/expert_divergence.h"

namespace edl::cpu {

DomainMeans domain_means(
    const double* sums, const double* squares, const double* counts, int64_t num_domains, int64_t num_experts) {
  DomainMeans result;
  result.width = (num_experts + kRowPadding - 1) / kRowPadding * kRowPadding;
  for (int64_t d = 0; d < num_domains; ++d) {
    // Written so that a NaN count takes part and shows.
    const bool left_out = squares != nullptr ? counts[d] < 2 : counts[d] <= 0;
    if (!left_out) {
      result.domains.push_back(d);
      result.counts.push_back(counts[d]);
    }
  }
  const int64_t size = result.size() * result.width;
  result.means.assign(size, 0.0);
  result.log_means.assign(size, 0.0);
  result.variance.assign(squares != nullptr ? size : 0, 0.0);
  for (int64_t j = 0; j < result.size(); ++j) {
    const double n = result.counts[j];
    const double* sum = sums + result.domains[j] * num_experts;
    for (int64_t e = 0; e < num_experts; ++e) {
      result.means[j * result.width + e] = sum[e] / n;
    }
    if (squares != nullptr) {
      const double* square = squares + result.domains[j] * num_experts;
      for (int64_t e = 0; e < num_experts; ++e) {
        const double variance = (square[e] - sum[e] * (sum[e] / n)) / (n - 1);
        result.variance[j * result.width + e] = variance < 0 ? 0.0 : variance / n; // below 0 by rounding alone
      }
    }
  }
  expert_divergence_loops().log_means(result.means.data(), size, result.log_means.data());
  return result;
}

} // namespace edl::cpu
