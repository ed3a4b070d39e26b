// pairwise_divergence on CUDA, host side; the kernel stands in kernels/expert_divergence.cu.
#include "ops/pairwise_divergence.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cuda/device.h"
#include "cuda/moments.h"

namespace edl::cuda {
namespace {

at::Tensor pairwise_divergence_cuda(
    const at::Tensor& sums, const at::Tensor& counts, const std::optional<at::Tensor>& squares) {
  check_pairwise_divergence(sums, counts, squares);
  const c10::cuda::CUDAGuard guard(sums.device());
  const DenseMoments dense(sums, counts, squares);
  at::DimVector shape(sums.sizes().begin(), sums.sizes().end());
  shape.back() = sums.size(-2);
  at::Tensor out = at::empty(shape, dense.sums.options());
  if (out.numel() == 0) {
    return out;
  }
  launch_pair_divergences(
      dense.view(), squares.has_value(), out.mutable_data_ptr<double>(), nullptr, nullptr, stream_of(sums));
  check_launch("edl::pairwise_divergence");
  return out;
}

} // namespace
} // namespace edl::cuda

TORCH_LIBRARY_IMPL(edl, CUDA, m) {
  m.impl("pairwise_divergence", edl::cuda::pairwise_divergence_cuda);
}
