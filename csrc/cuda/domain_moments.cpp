// domain_moments on CUDA, host side; the kernels' plan stands in kernels/domain_moments.cu.
#include "ops/domain_moments.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/errors.h"
#include "cuda/device.h"
#include "cuda/kernels/domain_moments.h"

namespace edl::cuda {
namespace {

// The arguments, dense; kept alive while the kernels are enqueued.
struct DenseSegments {
  DenseSegments(const at::Tensor& segment_sums, const at::Tensor& segment_counts, const at::Tensor& segment_labels)
      : sums(segment_sums.contiguous()),
        counts(segment_counts.contiguous()),
        labels((segment_labels.dim() == 1 ? segment_labels : segment_labels.to(at::kDouble)).contiguous()) {}

  LabelledSegments view(int64_t num_domains) const {
    return {
        .sums = sums.const_data_ptr(),
        .counts = counts.const_data_ptr(),
        .are_float64 = sums.scalar_type() == at::kDouble,
        .counts_are_shared = counts.dim() == 1 && sums.dim() > 2,
        .labels = labels.const_data_ptr(),
        .labels_are_64_bit = labels.scalar_type() == at::kLong,
        .labels_are_weights = labels.dim() == 2,
        .num_layers = layers_of(sums),
        .num_segments = sums.size(-2),
        .num_domains = num_domains,
        .num_experts = sums.size(-1)};
  }

  at::Tensor sums;
  at::Tensor counts;
  at::Tensor labels;
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> domain_moments_cuda(
    const at::Tensor& segment_sums,
    const at::Tensor& segment_counts,
    const at::Tensor& labels,
    int64_t num_domains,
    bool squares,
    std::string_view op) {
  check_domain_moments(op, segment_sums, segment_counts, labels, num_domains);
  const c10::cuda::CUDAGuard guard(segment_sums.device());
  if (values_are_checked(op)) {
    domain_moments_for(segment_sums.cpu(), segment_counts.cpu(), labels.cpu(), num_domains, squares, op);
  }
  const auto options = segment_sums.options().dtype(at::kDouble).memory_format(at::MemoryFormat::Contiguous);
  at::DimVector shape(segment_sums.sizes().begin(), segment_sums.sizes().end());
  shape[shape.size() - 2] = num_domains;
  at::Tensor sums = at::empty(shape, options);
  at::Tensor squared = squares ? at::empty(shape, options) : at::empty({0}, options);
  shape.pop_back();
  at::Tensor counts = at::empty(shape, options);
  if (counts.numel() == 0) {
    return {sums, squared, counts};
  }
  const DenseSegments dense(segment_sums, segment_counts, labels);
  launch_domain_moments(
      dense.view(num_domains), sums.mutable_data_ptr<double>(), squares ? squared.mutable_data_ptr<double>() : nullptr,
      counts.mutable_data_ptr<double>(), stream_of(segment_sums));
  check_launch(op);
  return {sums, squared, counts};
}

at::Tensor domain_moments_backward_cuda(
    const at::Tensor& grad_sums,
    const at::Tensor& grad_squares,
    const at::Tensor& segment_sums,
    const at::Tensor& segment_counts,
    const at::Tensor& labels,
    std::string_view op) {
  check_domain_moments_backward(op, grad_sums, grad_squares, segment_sums, segment_counts, labels);
  const int64_t num_domains = grad_sums.size(-2);
  const c10::cuda::CUDAGuard guard(segment_sums.device());
  const DenseSegments dense(segment_sums, segment_counts, labels);
  at::Tensor grad_segment_sums = at::empty(dense.sums.sizes(), dense.sums.options());
  if (grad_segment_sums.numel() == 0) {
    return grad_segment_sums;
  }
  const at::Tensor grad = grad_sums.contiguous();
  const at::Tensor grad_of_squares = grad_squares.contiguous();
  launch_domain_moments_backward(
      dense.view(num_domains), grad.const_data_ptr<double>(),
      grad_of_squares.numel() == 0 ? nullptr : grad_of_squares.const_data_ptr<double>(),
      grad_segment_sums.mutable_data_ptr(), stream_of(segment_sums));
  check_launch(op);
  return grad_segment_sums;
}

} // namespace
} // namespace edl::cuda

TORCH_LIBRARY_IMPL(edl, CUDA, m) {
  m.impl("domain_moments", edl::cuda::domain_moments_cuda);
  m.impl("_domain_moments_backward", edl::cuda::domain_moments_backward_cuda);
}
