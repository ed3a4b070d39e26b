#include "cuda/expert_products.h"

#include <ATen/ops/_grouped_mm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <cuda_runtime_api.h>

#include "common/errors.h"
#include "cuda/device.h"
#include "cuda/kernels/expert_mlp.h"

namespace edl::cuda {
namespace {

constexpr int64_t kMostGroups = 1023; // of at::_grouped_mm

bool has_grouped_kernel(const at::Device& device) {
  int major = 0;
  return cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device.index()) == cudaSuccess &&
      (major == 9 || major == 10);
}

bool rows_are_aligned(const at::Tensor& matrices) {
  return matrices.is_contiguous() && matrices.size(2) % 8 == 0 && is_aligned_to_16(matrices.const_data_ptr());
}

bool can_group(const at::Tensor& gate_up, const at::Tensor& down) {
  return gate_up.scalar_type() == at::kBFloat16 && gate_up.size(0) <= kMostGroups && rows_are_aligned(gate_up) &&
      rows_are_aligned(down) && has_grouped_kernel(gate_up.device());
}

std::vector<int64_t> read_on_host(const at::Tensor& offsets) {
  const at::Tensor copy = offsets.cpu();
  const auto* data = copy.const_data_ptr<int32_t>();
  return {data, data + copy.numel()};
}

} // namespace

ExpertProducts::ExpertProducts(
    const char* op, const at::Tensor& offsets, const at::Tensor& gate_up, const at::Tensor& down)
    : offsets_(offsets), grouped_(can_group(gate_up, down)) {
  if (grouped_) {
    return;
  }
  EDL_CHECK(
      !is_capturing(), op,
      ": a CUDA graph can capture the experts only where one kernel serves all of them: bfloat16, compute capability 9 "
      "or 10, "
      "H and I multiples of 8 (got ",
      gate_up.scalar_type(), ", H = ", down.size(1), ", I = ", down.size(2), ")");
  bounds_ = read_on_host(offsets);
}

at::Tensor ExpertProducts::by_row(const at::Tensor& rows, const at::Tensor& matrices) const {
  if (grouped_) {
    return at::_grouped_mm(rows, matrices, offsets_.narrow(0, 1, num_experts()));
  }
  at::Tensor result = at::empty({rows.size(0), matrices.size(2)}, rows.options());
  for (int64_t e = 0; e < num_experts(); ++e) {
    const int64_t count = bounds_[e + 1] - bounds_[e];
    if (count > 0) {
      at::Tensor out = result.narrow(0, bounds_[e], count);
      at::mm_out(out, rows.narrow(0, bounds_[e], count), matrices.select(0, e));
    }
  }
  return result;
}

at::Tensor ExpertProducts::by_expert(const at::Tensor& left, const at::Tensor& right) const {
  if (grouped_) {
    at::Tensor result = at::_grouped_mm(left.t(), right, offsets_.narrow(0, 1, num_experts()));
    // An expert without rows is a sum over nothing, which not every kernel writes.
    launch_zero_unused(
        result.mutable_data_ptr(), num_experts(), result.stride(0) * result.element_size(),
        offsets_.const_data_ptr<int32_t>(), stream_of(result));
    return result;
  }
  at::Tensor result = at::empty({num_experts(), left.size(1), right.size(1)}, left.options());
  for (int64_t e = 0; e < num_experts(); ++e) {
    const int64_t count = bounds_[e + 1] - bounds_[e];
    at::Tensor out = result.select(0, e);
    if (count > 0) {
      at::mm_out(out, left.narrow(0, bounds_[e], count).t(), right.narrow(0, bounds_[e], count));
    } else {
      out.zero_();
    }
  }
  return result;
}

} // namespace edl::cuda
