// token_gram on CUDA, host side; the kernels stand in kernels/token_gram.cu. A slot that row_order does not name becomes
// NaN where the CPU raises.
#include "ops/token_gram.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "common/dtypes.h"
#include "cuda/device.h"
#include "cuda/rows.h"
#include "cuda/token_gram.h"

namespace edl::cuda {
namespace {

constexpr const char* kOp = "edl::token_gram";

at::Tensor token_gram_cuda(
    const at::Tensor& rows, const std::optional<at::Tensor>& weights, const at::Tensor& row_order, int64_t top_k) {
  check_token_gram(rows, weights, row_order, top_k);
  const c10::cuda::CUDAGuard guard(rows.device());
  if (values_are_checked(kOp)) {
    token_gram(at::zeros({rows.size(0), 1}), std::nullopt, row_order.cpu(), top_k);
  }
  const at::Tensor factors = dense_if(weights, accumulation_type(rows.scalar_type()));
  const at::Tensor row_of_slot = rows_of_slots(row_order.contiguous(), nullptr);
  const at::Tensor gram = grams_of(with_dense_rows(rows), row_of_slot, factors, top_k);
  check_launch(kOp);
  return gram;
}

at::Tensor token_gram_backward_cuda(
    const at::Tensor& grad_gram,
    const at::Tensor& rows,
    const std::optional<at::Tensor>& weights,
    const at::Tensor& row_order,
    int64_t top_k) {
  check_token_gram_backward(grad_gram, rows, weights, row_order, top_k);
  const c10::cuda::CUDAGuard guard(rows.device());
  at::Tensor grad_rows = at::empty(rows.sizes(), rows.options().memory_format(at::MemoryFormat::Contiguous));
  if (rows.numel() == 0) {
    return grad_rows;
  }
  const at::Tensor grad = grad_gram.contiguous();
  const at::Tensor source = with_dense_rows(rows);
  const at::Tensor order = row_order.contiguous();
  const at::Tensor row_of_slot = rows_of_slots(order, nullptr);
  const at::Tensor factors = dense_if(weights, accumulation_type(rows.scalar_type()));
  launch_token_gram_backward(
      {.tokens = token_rows(source, row_of_slot, factors, top_k),
       .grad_gram = grad.const_data_ptr(),
       .row_order = order.const_data_ptr<int32_t>(),
       .num_used = nullptr,
       .grad_output = nullptr,
       .grad_output_stride = 0,
       .grad_weights = nullptr,
       .grad_rows = grad_rows.mutable_data_ptr()},
      stream_of(rows));
  check_launch(kOp);
  return grad_rows;
}

} // namespace

TokenRows token_rows(const at::Tensor& rows, const at::Tensor& row_of_slot, const at::Tensor& weights, int64_t top_k) {
  return {
      .rows = rows.const_data_ptr(),
      .storage = storage_of(rows),
      .rows_stride = rows.stride(0),
      .row_of_slot = row_of_slot.const_data_ptr<int32_t>(),
      .weights = data_if(weights),
      .num_tokens = rows.size(0) / top_k,
      .top_k = top_k,
      .width = rows.size(1)};
}

at::Tensor grams_of(const at::Tensor& rows, const at::Tensor& row_of_slot, const at::Tensor& weights, int64_t top_k) {
  const auto options = rows.options().dtype(accumulation_type(rows.scalar_type()));
  if (rows.numel() == 0) { // of rows without numbers
    return at::zeros({rows.size(0) / top_k, top_k, top_k}, options);
  }
  at::Tensor gram = at::empty({rows.size(0) / top_k, top_k, top_k}, options);
  launch_token_gram(
      {.tokens = token_rows(rows, row_of_slot, weights, top_k), .gram = gram.mutable_data_ptr()}, stream_of(rows));
  return gram;
}

} // namespace edl::cuda

TORCH_LIBRARY_IMPL(edl, CUDA, m) {
  m.impl("token_gram", edl::cuda::token_gram_cuda);
  m.impl("_token_gram_backward", edl::cuda::token_gram_backward_cuda);
}
