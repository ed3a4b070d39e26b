#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace edl::cuda {

struct DomainMoments {
  const double* sums; //    [L, D, E]
  const double* squares; // [L, D, E]; null without bias correction
  const double* counts; //  [L, D]
  int64_t num_layers; //    L
  int64_t num_domains; //   D, at least 1
  int64_t num_experts; //   E, at least 1
};

// divergences[l, j, k]: D_jk, less its bias where `subtract_bias`; 0 on the diagonal, NaN where j or k does not take
// part. biases, where not null: b_jk off the diagonal. present, where not null: of each layer the number of domains that
// take part, and these in order.
void launch_pair_divergences(
    const DomainMoments& moments,
    bool subtract_bias,
    double* divergences, // [L, D, D]
    double* biases, //      [L, D, D] or null
    int32_t* present, //    [L, D + 1] or null
    cudaStream_t stream);

struct DivergenceLoss {
  double eps;
  bool log_of_mean; // else the mean of the logs
  const double* divergences; // [L, D, D]
  const double* biases; //      [L, D, D]; null without bias correction
  const int32_t* present; //    [L, D + 1]
  double* means; //             [L] scratch: the mean over the pairs, of D or of its negative log
  double* loss; //              [L]
  double* grad_sums; //         [L, D, E], or null: the value alone
  double* grad_squares; //      [L, D, E]; null without bias correction
};

void launch_divergence_loss(const DomainMoments& moments, const DivergenceLoss& loss, cudaStream_t stream);

} // namespace edl::cuda
