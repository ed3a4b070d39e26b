// combine_tokens on the CPU: rows [N, H], weights [T, K] or none, row_order [N] → output [T, H].
//
// The inverse of row_order turns the scatter of rows into a gather per token: each token is summed by one thread, in
// the order of its choices, in float32 (float64 for float64). Scratch O(N).
#include "ops/combine_tokens.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <torch/library.h>

#include <algorithm>

#include "common/dtypes.h"
#include "common/tensors.h"
#include "cpu/isa/combine_tokens.h"
#include "cpu/row_order.h"

namespace edl::cpu {
namespace {

constexpr const char* kOp = "edl::combine_tokens";
constexpr int64_t kGrainElements = 1 << 15; // work below this is not worth a thread

int64_t grain_tokens(int64_t top_k, int64_t width) {
  return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, top_k * width));
}

// [T, K] in the accumulation type; ones where there are no weights.
at::Tensor factors_of(const std::optional<at::Tensor>& weights, const at::Tensor& rows, int64_t top_k) {
  const auto type = accumulation_type(rows.scalar_type());
  return weights.has_value() ? weights->to(type).contiguous()
                             : at::ones({rows.size(0) / top_k, top_k}, rows.options().dtype(type));
}

at::Tensor combine_tokens_cpu(
    const at::Tensor& rows, const std::optional<at::Tensor>& weights, const at::Tensor& row_order, int64_t top_k) {
  check_combine_tokens(rows, weights, row_order, top_k);
  check_memory(kOp, rows, weights, row_order);
  const at::Tensor source = with_dense_rows(rows);
  const at::Tensor order = row_order.contiguous();
  const at::Tensor factors = factors_of(weights, rows, top_k);
  const int64_t num_tokens = rows.size(0) / top_k;
  const std::vector<int32_t> row_of_slot = rows_of_slots(kOp, order.const_data_ptr<int32_t>(), order.size(0));
  at::Tensor output = at::empty({num_tokens, rows.size(1)}, rows.options());
  const CombineTask task{
      source.const_data_ptr(),  source.stride(0), row_of_slot.data(), factors.const_data_ptr(), top_k, rows.size(1),
      output.mutable_data_ptr()};
  const auto combine = combine_tokens_loops().combine[static_cast<int>(storage_of(rows))];
  at::parallel_for(
      0, num_tokens, grain_tokens(top_k, rows.size(1)), [&](int64_t begin, int64_t end) { combine(task, begin, end); });
  return output;
}

std::tuple<at::Tensor, at::Tensor> combine_tokens_backward_cpu(
    const at::Tensor& grad_output,
    const at::Tensor& rows,
    const std::optional<at::Tensor>& weights,
    const at::Tensor& row_order,
    int64_t top_k,
    std::array<bool, 2> needed) {
  check_combine_tokens_backward(grad_output, rows, weights, row_order, top_k);
  check_memory(kOp, grad_output, rows, weights, row_order);
  const at::Tensor grad = with_dense_rows(grad_output);
  const at::Tensor source = with_dense_rows(rows);
  const at::Tensor order = row_order.contiguous();
  const at::Tensor factors = factors_of(weights, rows, top_k);
  const std::vector<int32_t> row_of_slot = rows_of_slots(kOp, order.const_data_ptr<int32_t>(), order.size(0));
  const bool of_weights = needed[1] && weights.has_value();
  at::Tensor grad_rows = empty_if(needed[0], rows);
  at::Tensor grad_weights = empty_if(of_weights, factors);
  const CombineGradient task{
      grad.const_data_ptr(),
      grad.stride(0),
      source.const_data_ptr(),
      source.stride(0),
      row_of_slot.data(),
      factors.const_data_ptr(),
      top_k,
      rows.size(1),
      needed[0] ? grad_rows.mutable_data_ptr() : nullptr,
      of_weights ? grad_weights.mutable_data_ptr() : nullptr};
  const auto spread = combine_tokens_loops().spread[static_cast<int>(storage_of(rows))];
  at::parallel_for(0, grad.size(0), grain_tokens(top_k, rows.size(1)), [&](int64_t begin, int64_t end) {
    spread(task, begin, end);
  });
  return {grad_rows, grad_weights.to(weights.has_value() ? weights->scalar_type() : rows.scalar_type())};
}

} // namespace
} // namespace edl::cpu

TORCH_LIBRARY_IMPL(edl, CPU, m) {
  m.impl("combine_tokens", edl::cpu::combine_tokens_cpu);
  m.impl("_combine_tokens_backward", edl::cpu::combine_tokens_backward_cpu);
}
