// route_tokens on CUDA, host side; the kernels' plan stands in kernels/route_tokens.cu.
#include "ops/route_tokens.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/dtypes.h"
#include "common/errors.h"
#include "cuda/device.h"
#include "cuda/kernels/route_tokens.h"

namespace edl::cuda {
namespace {

constexpr const char* kOp = "edl::route_tokens";

std::tuple<at::Tensor, at::Tensor> route_tokens_cuda(
    const at::Tensor& logits,
    int64_t top_k,
    std::string_view scores_name,
    const std::optional<at::Tensor>& bias,
    bool normalize,
    double scale) {
  const Scores scores = check_route_tokens(logits, top_k, scores_name, bias);
  const StorageType storage = storage_of(logits);
  EDL_ENSURE(
      logits.size(1) <= most_experts_to_route(storage), kOp, ": on CUDA the number of experts must be at most ",
      most_experts_to_route(storage), " for ", logits.scalar_type(), " logits (got ", logits.size(1), ")");
  const c10::cuda::CUDAGuard guard(logits.device());
  const auto options = logits.options().dtype(accumulation_type(logits.scalar_type()));
  at::Tensor weights = at::empty({logits.size(0), top_k}, options);
  at::Tensor experts = at::empty({logits.size(0), top_k}, logits.options().dtype(at::kLong));
  if (weights.numel() == 0) {
    return {weights, experts};
  }
  const at::Tensor rows = with_dense_rows(logits);
  const at::Tensor dense_bias = bias.has_value() ? bias->to(weights.scalar_type()).contiguous() : at::Tensor();
  launch_route_tokens(
      {.logits = rows.const_data_ptr(),
       .storage = storage,
       .row_stride = rows.stride(0),
       .num_tokens = rows.size(0),
       .num_experts = rows.size(1),
       .top_k = top_k,
       .scores = scores,
       .bias = dense_bias.defined() ? dense_bias.const_data_ptr() : nullptr,
       .normalize = normalize,
       .scale = scale,
       .weights = weights.mutable_data_ptr(),
       .experts = experts.mutable_data_ptr<int64_t>()},
      stream_of(rows));
  check_launch(kOp);
  return {weights, experts};
}

at::Tensor route_tokens_backward_cuda(
    const at::Tensor& grad_weights,
    const at::Tensor& logits,
    const at::Tensor& experts,
    std::string_view scores_name,
    bool normalize,
    double scale) {
  const Scores scores = check_route_tokens_backward(grad_weights, logits, experts, scores_name);
  const c10::cuda::CUDAGuard guard(logits.device());
  at::Tensor grad_logits = at::empty(logits.sizes(), logits.options().memory_format(at::MemoryFormat::Contiguous));
  if (grad_logits.numel() == 0) {
    return grad_logits;
  }
  const at::Tensor grad = grad_weights.contiguous();
  const at::Tensor rows = with_dense_rows(logits);
  const at::Tensor chosen = experts.contiguous();
  launch_route_tokens_backward(
      {.grad_weights = grad.const_data_ptr(),
       .logits = rows.const_data_ptr(),
       .storage = storage_of(rows),
       .row_stride = rows.stride(0),
       .num_tokens = rows.size(0),
       .num_experts = rows.size(1),
       .top_k = chosen.size(1),
       .experts = chosen.const_data_ptr<int64_t>(),
       .scores = scores,
       .normalize = normalize,
       .scale = scale,
       .grad_logits = grad_logits.mutable_data_ptr()},
      stream_of(rows));
  check_launch(kOp);
  return grad_logits;
}

} // namespace
} // namespace edl::cuda

TORCH_LIBRARY_IMPL(edl, CUDA, m) {
  m.impl("route_tokens", edl::cuda::route_tokens_cuda);
  m.impl("_route_tokens_backward", edl::cuda::route_tokens_backward_cuda);
}
