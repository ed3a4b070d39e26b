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

const uint8_t* bytes_of(const at::Tensor& allowed) {
  return allowed.defined() ? static_cast<const uint8_t*>(allowed.const_data_ptr()) : nullptr;
}

std::tuple<at::Tensor, at::Tensor> route_tokens_cuda(
    const at::Tensor& logits,
    int64_t top_k,
    std::string_view scores_name,
    const std::optional<at::Tensor>& bias,
    bool normalize,
    double scale,
    const std::optional<at::Tensor>& allowed,
    const std::optional<at::Tensor>& given) {
  const Scores scores = check_route_tokens(logits, top_k, scores_name, bias, allowed, given);
  const StorageType storage = storage_of(logits);
  EDL_ENSURE(
      logits.size(1) <= most_experts_to_route(storage), kOp, ": on CUDA the number of experts must be at most ",
      most_experts_to_route(storage), " for ", logits.scalar_type(), " logits (got ", logits.size(1), ")");
  const c10::cuda::CUDAGuard guard(logits.device());
  if ((allowed.has_value() || given.has_value()) && values_are_checked(kOp)) {
    const auto on_cpu = [](const std::optional<at::Tensor>& tensor) {
      return tensor.has_value() ? std::optional(tensor->cpu()) : std::nullopt;
    };
    route_tokens(logits.cpu(), top_k, scores_name, {}, normalize, scale, on_cpu(allowed), on_cpu(given));
  }
  const auto options = logits.options().dtype(accumulation_type(logits.scalar_type()));
  at::Tensor weights = at::empty({logits.size(0), top_k}, options);
  at::Tensor experts = at::empty({logits.size(0), top_k}, logits.options().dtype(at::kLong));
  if (weights.numel() == 0) {
    return {weights, experts};
  }
  const at::Tensor rows = with_dense_rows(logits);
  const bool is_biased = bias.has_value() && !given.has_value();
  const at::Tensor dense_bias = is_biased ? bias->to(weights.scalar_type()).contiguous() : at::Tensor();
  const at::Tensor dense_allowed = allowed.has_value() ? with_dense_rows(*allowed) : at::Tensor();
  const at::Tensor dense_given = given.has_value() ? given->contiguous() : at::Tensor();
  launch_route_tokens(
      {.logits = rows.const_data_ptr(),
       .storage = storage,
       .row_stride = rows.stride(0),
       .num_tokens = rows.size(0),
       .num_experts = rows.size(1),
       .top_k = top_k,
       .scores = scores,
       .bias = dense_bias.defined() ? dense_bias.const_data_ptr() : nullptr,
       .allowed = bytes_of(dense_allowed),
       .allowed_stride = dense_allowed.defined() ? dense_allowed.stride(0) : 0,
       .given = dense_given.defined() ? dense_given.const_data_ptr() : nullptr,
       .given_are_64_bit = dense_given.defined() && dense_given.scalar_type() == at::kLong,
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
    double scale,
    const std::optional<at::Tensor>& allowed,
    bool given) {
  const Scores scores = check_route_tokens_backward(grad_weights, logits, experts, scores_name, allowed, given);
  const c10::cuda::CUDAGuard guard(logits.device());
  at::Tensor grad_logits = at::empty(logits.sizes(), logits.options().memory_format(at::MemoryFormat::Contiguous));
  if (grad_logits.numel() == 0) {
    return grad_logits;
  }
  const at::Tensor grad = grad_weights.contiguous();
  const at::Tensor rows = with_dense_rows(logits);
  const at::Tensor chosen = experts.contiguous();
  const at::Tensor dense_allowed = allowed.has_value() ? with_dense_rows(*allowed) : at::Tensor();
  launch_route_tokens_backward(
      {.grad_weights = grad.const_data_ptr(),
       .logits = rows.const_data_ptr(),
       .storage = storage_of(rows),
       .row_stride = rows.stride(0),
       .num_tokens = rows.size(0),
       .num_experts = rows.size(1),
       .top_k = chosen.size(1),
       .experts = chosen.const_data_ptr(),
       .experts_are_64_bit = chosen.scalar_type() == at::kLong,
       .given = given,
       .allowed = bytes_of(dense_allowed),
       .allowed_stride = dense_allowed.defined() ? dense_allowed.stride(0) : 0,
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
