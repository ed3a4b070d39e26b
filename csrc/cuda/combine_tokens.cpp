// combine_tokens on CUDA, host side; the kernels stand in kernels/rows.cu. A slot that row_order does not name becomes
// NaN where the CPU raises.
#include "ops/combine_tokens.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "common/dtypes.h"
#include "cuda/device.h"
#include "cuda/kernels/rows.h"
#include "cuda/rows.h"

namespace edl::cuda {
namespace {

constexpr const char* kOp = "edl::combine_tokens";

at::Tensor combine_tokens_cuda(
    const at::Tensor& rows, const std::optional<at::Tensor>& weights, const at::Tensor& row_order, int64_t top_k) {
  check_combine_tokens(rows, weights, row_order, top_k);
  const c10::cuda::CUDAGuard guard(rows.device());
  if (values_are_checked(kOp)) {
    combine_tokens(at::zeros({rows.size(0), 1}), std::nullopt, row_order.cpu(), top_k);
  }
  const at::Tensor row_of_slot = rows_of_slots(row_order.contiguous(), nullptr);
  const at::Tensor factors = dense_if(weights, accumulation_type(rows.scalar_type()));
  const at::Tensor output = combine_rows(rows, row_of_slot, factors, top_k);
  check_launch(kOp);
  return output;
}

std::tuple<at::Tensor, at::Tensor> combine_tokens_backward_cuda(
    const at::Tensor& grad_output,
    const at::Tensor& rows,
    const std::optional<at::Tensor>& weights,
    const at::Tensor& row_order,
    int64_t top_k,
    std::array<bool, 2> needed) {
  check_combine_tokens_backward(grad_output, rows, weights, row_order, top_k);
  const c10::cuda::CUDAGuard guard(rows.device());
  const bool of_weights = needed[1] && weights.has_value();
  const auto type = accumulation_type(rows.scalar_type());
  const auto accumulation = rows.options().dtype(type);
  at::Tensor grad_rows = empty_if(needed[0], rows);
  at::Tensor grad_weights = of_weights ? at::zeros(weights->sizes(), accumulation) : at::empty({0}, accumulation);
  if (rows.numel() > 0 && (needed[0] || of_weights)) {
    const at::Tensor grad = with_dense_rows(grad_output);
    const at::Tensor source = with_dense_rows(rows);
    const at::Tensor order = row_order.contiguous();
    const at::Tensor factors = dense_if(weights, type);
    launch_combine_backward(
        {.grad_output = grad.const_data_ptr(),
         .storage = storage_of(grad),
         .grad_output_stride = grad.stride(0),
         .rows = source.const_data_ptr(),
         .rows_stride = source.stride(0),
         .row_order = order.const_data_ptr<int32_t>(),
         .weights = data_if(factors),
         .num_rows = rows.size(0),
         .top_k = top_k,
         .width = rows.size(1),
         .grad_rows = needed[0] ? grad_rows.mutable_data_ptr() : nullptr,
         .grad_weights = of_weights ? grad_weights.mutable_data_ptr() : nullptr},
        stream_of(rows));
    check_launch(kOp);
  }
  return {grad_rows, grad_weights.to(weights.has_value() ? weights->scalar_type() : rows.scalar_type())};
}

} // namespace
} // namespace edl::cuda

TORCH_LIBRARY_IMPL(edl, CUDA, m) {
  m.impl("combine_tokens", edl::cuda::combine_tokens_cuda);
  m.impl("_combine_tokens_backward", edl::cuda::combine_tokens_backward_cuda);
}
