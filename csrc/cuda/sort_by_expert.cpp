// sort_by_expert on CUDA, host side; the kernels' plan stands in kernels/sort_by_expert.cu.
#include "ops/sort_by_expert.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "common/errors.h"
#include "cuda/device.h"
#include "cuda/kernels/sort_by_expert.h"

namespace edl::cuda {
namespace {

std::tuple<at::Tensor, at::Tensor> sort_by_expert_cuda(
    const at::Tensor& experts, int64_t num_experts, std::string_view op) {
  check_sort_by_expert(op, experts, num_experts);
  EDL_ENSURE(
      num_experts <= most_experts_to_sort(), op, ": on CUDA num_experts must be at most ", most_experts_to_sort(),
      " (got ", num_experts, ")");
  const c10::cuda::CUDAGuard guard(experts.device());
  if (values_are_checked(op)) {
    sort_by_expert_for(experts.cpu(), num_experts, op);
  }
  const auto options = experts.options().dtype(at::kInt);
  const int64_t num_slots = experts.numel();
  at::Tensor row_order = at::empty({num_slots}, options);
  if (num_slots == 0) {
    return {row_order, at::zeros({num_experts + 1}, options)};
  }
  const at::Tensor ids = experts.contiguous();
  at::Tensor offsets = at::empty({num_experts + 1}, options);
  at::Tensor scratch = at::empty({sort_scratch_size(num_slots, num_experts)}, options);
  launch_sort_by_expert(
      {.experts = ids.const_data_ptr(),
       .experts_are_64_bit = ids.scalar_type() == at::kLong,
       .num_slots = num_slots,
       .num_experts = num_experts,
       .scratch = scratch.mutable_data_ptr<int32_t>(),
       .row_order = row_order.mutable_data_ptr<int32_t>(),
       .offsets = offsets.mutable_data_ptr<int32_t>()},
      stream_of(ids));
  check_launch(op);
  return {row_order, offsets};
}

} // namespace
} // namespace edl::cuda

TORCH_LIBRARY_IMPL(edl, CUDA, m) {
  m.impl("sort_by_expert", edl::cuda::sort_by_expert_cuda);
}
