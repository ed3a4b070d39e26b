// expert_divergence on CUDA, host side; the kernels' plan stands in kernels/expert_divergence.cu.
#include "ops/expert_divergence.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "cuda/device.h"
#include "cuda/moments.h"

namespace edl::cuda {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> divergence_and_gradient(
    std::string_view op,
    const at::Tensor& sums,
    const at::Tensor& counts,
    double eps,
    PairReduction reduction,
    const std::optional<at::Tensor>& squares,
    bool with_gradient) {
  const bool bias_correction = squares.has_value();
  const c10::cuda::CUDAGuard guard(sums.device());
  const DenseMoments dense(sums, counts, squares);
  const auto options = dense.sums.options();
  const auto empty_if = [&](bool wanted) {
    return wanted ? at::empty(sums.sizes(), options) : at::empty({0}, options);
  };
  at::Tensor grad_sums = empty_if(with_gradient);
  at::Tensor grad_squares = empty_if(with_gradient && bias_correction);
  if (sums.numel() == 0) { // no domain or no expert: nothing to push apart
    return {at::zeros(sums.sizes().slice(0, sums.dim() - 2), options), grad_sums, grad_squares};
  }
  const int64_t layers = layers_of(sums);
  const int64_t domains = sums.size(-2);
  at::Tensor loss = at::empty(sums.sizes().slice(0, sums.dim() - 2), options);
  at::Tensor means = at::empty({layers}, options);
  at::Tensor divergences = at::empty({layers, domains, domains}, options);
  at::Tensor biases = at::empty({bias_correction ? layers : 0, domains, domains}, options);
  at::Tensor present = at::empty({layers, domains + 1}, options.dtype(at::kInt));
  double* biases_data = bias_correction ? biases.mutable_data_ptr<double>() : nullptr;
  const cudaStream_t stream = stream_of(sums);
  launch_pair_divergences(
      dense.view(), false, divergences.mutable_data_ptr<double>(), biases_data, present.mutable_data_ptr<int32_t>(),
      stream);
  launch_divergence_loss(
      dense.view(),
      {.eps = eps,
       .log_of_mean = reduction == PairReduction::log_of_mean,
       .divergences = divergences.const_data_ptr<double>(),
       .biases = biases_data,
       .present = present.const_data_ptr<int32_t>(),
       .means = means.mutable_data_ptr<double>(),
       .loss = loss.mutable_data_ptr<double>(),
       .grad_sums = with_gradient ? grad_sums.mutable_data_ptr<double>() : nullptr,
       .grad_squares = with_gradient && bias_correction ? grad_squares.mutable_data_ptr<double>() : nullptr},
      stream);
  check_launch(op);
  return {loss, grad_sums, grad_squares};
}

at::Tensor expert_divergence_cuda(
    const at::Tensor& sums,
    const at::Tensor& counts,
    double eps,
    std::string_view reduction,
    const std::optional<at::Tensor>& squares,
    std::string_view op) {
  const PairReduction parsed = check_expert_divergence(op, sums, counts, eps, reduction, squares);
  return std::get<0>(divergence_and_gradient(op, sums, counts, eps, parsed, squares, false));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> expert_divergence_with_gradient_cuda(
    const at::Tensor& sums,
    const at::Tensor& counts,
    double eps,
    std::string_view reduction,
    const std::optional<at::Tensor>& squares,
    std::string_view op) {
  const PairReduction parsed = check_expert_divergence(op, sums, counts, eps, reduction, squares);
  return divergence_and_gradient(op, sums, counts, eps, parsed, squares, true);
}

} // namespace
} // namespace edl::cuda

TORCH_LIBRARY_IMPL(edl, CUDA, m) {
  m.impl("expert_divergence", edl::cuda::expert_divergence_cuda);
  m.impl("_expert_divergence_with_gradient", edl::cuda::expert_divergence_with_gradient_cuda);
}
