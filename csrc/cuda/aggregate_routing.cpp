// aggregate_routing on CUDA, host side: memory and launches; the kernels' plan stands in kernels/aggregate_routing.cu.
#include "ops/aggregate_routing.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <limits>

#include "common/dtypes.h"
#include "common/errors.h"
#include "cuda/device.h"
#include "cuda/kernels/aggregate_routing.h"

namespace edl::cuda {
namespace {

constexpr const char* kOp = "edl::aggregate_routing";

std::tuple<at::Tensor, at::Tensor> aggregate_routing_cuda(
    const at::Tensor& routing, const at::Tensor& segment_ids, int64_t num_segments, std::string_view scores_name) {
  const Scores scores = check_aggregate_routing(routing, segment_ids, num_segments, scores_name);
  EDL_CHECK(
      num_segments < std::numeric_limits<int32_t>::max(), kOp, ": on CUDA num_segments must be below 2^31 - 1 (got ",
      num_segments, ")");
  const c10::cuda::CUDAGuard guard(routing.device());
  if (values_are_checked(kOp)) {
    aggregate_routing(routing.cpu(), segment_ids.cpu(), num_segments, scores_name);
  }
  const auto options = routing.options().dtype(accumulation_type(routing.scalar_type()));
  const int64_t num_tokens = routing.size(0);
  const int64_t num_experts = routing.size(1);
  if (num_tokens == 0 || num_segments == 0) {
    return {at::zeros({num_segments, num_experts}, options), at::zeros({num_segments}, options)};
  }
  const at::Tensor rows = with_dense_rows(routing);
  const at::Tensor ids = segment_ids.contiguous();
  const StorageType storage = storage_of(rows);
  at::Tensor sums = at::empty({num_segments, num_experts}, options);
  at::Tensor counts = at::empty({num_segments}, options);
  at::Tensor scratch = at::empty(
      {aggregate_routing_scratch_bytes(num_tokens, num_experts, storage)}, routing.options().dtype(at::kByte));
  launch_aggregate_routing(
      {.routing = rows.const_data_ptr(),
       .storage = storage,
       .row_stride = rows.stride(0),
       .segment_ids = ids.const_data_ptr(),
       .ids_are_64_bit = ids.scalar_type() == at::kLong,
       .num_tokens = num_tokens,
       .num_experts = num_experts,
       .num_segments = num_segments,
       .scores = scores,
       .scratch = scratch.mutable_data_ptr(),
       .sums = sums.mutable_data_ptr(),
       .counts = counts.mutable_data_ptr()},
      stream_of(rows));
  check_launch(kOp);
  return {sums, counts};
}

at::Tensor aggregate_routing_backward_cuda(
    const at::Tensor& grad_sums,
    const at::Tensor& routing,
    const at::Tensor& segment_ids,
    std::string_view scores_name) {
  const Scores scores = check_aggregate_routing_backward(grad_sums, routing, segment_ids, scores_name);
  const c10::cuda::CUDAGuard guard(routing.device());
  at::Tensor grad_routing = at::empty(routing.sizes(), routing.options().memory_format(at::MemoryFormat::Contiguous));
  if (grad_routing.numel() == 0) {
    return grad_routing;
  }
  const at::Tensor grad = grad_sums.contiguous();
  const at::Tensor rows = with_dense_rows(routing);
  const at::Tensor ids = segment_ids.contiguous();
  launch_aggregate_routing_backward(
      {.grad_sums = grad.const_data_ptr(),
       .segment_ids = ids.const_data_ptr(),
       .ids_are_64_bit = ids.scalar_type() == at::kLong,
       .routing = rows.const_data_ptr(),
       .storage = storage_of(rows),
       .row_stride = rows.stride(0),
       .num_tokens = rows.size(0),
       .num_experts = rows.size(1),
       .num_segments = grad.size(0),
       .scores = scores,
       .grad_routing = grad_routing.mutable_data_ptr()},
      stream_of(rows));
  check_launch(kOp);
  return grad_routing;
}

} // namespace
} // namespace edl::cuda

TORCH_LIBRARY_IMPL(edl, CUDA, m) {
  m.impl("aggregate_routing", edl::cuda::aggregate_routing_cuda);
  m.impl("_aggregate_routing_backward", edl::cuda::aggregate_routing_backward_cuda);
}
