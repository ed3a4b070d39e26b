// route_tokens on the CPU: logits [T, E], bias [E] → weights [T, K], experts [T, K].
//
// Rows are independent: one pass over them, computed in float32 (float64 for float64). Scratch: a few rows per thread.
#include "ops/route_tokens.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "common/dtypes.h"
#include "common/errors.h"
#include "common/tensors.h"
#include "cpu/isa/route_tokens.h"

namespace edl::cpu {
namespace {

constexpr int64_t kGrainElements = 1 << 14; // work below this is not worth a thread

int64_t grain_rows(int64_t num_experts) {
  return std::max<int64_t>(1, kGrainElements / num_experts);
}

std::tuple<at::Tensor, at::Tensor> route_tokens_cpu(
    const at::Tensor& logits,
    int64_t top_k,
    std::string_view scores_name,
    const std::optional<at::Tensor>& bias,
    bool normalize,
    double scale) {
  const Scores scores = check_route_tokens(logits, top_k, scores_name, bias);
  check_memory("edl::route_tokens", logits, bias);
  const at::Tensor rows = with_dense_rows(logits);
  const auto type = accumulation_type(logits.scalar_type());
  const at::Tensor dense_bias = bias.has_value() ? bias->to(type).contiguous() : at::Tensor();
  at::Tensor weights = at::empty({rows.size(0), top_k}, logits.options().dtype(type));
  at::Tensor experts = at::empty({rows.size(0), top_k}, logits.options().dtype(at::kLong));
  const RouteTask task{
      rows.const_data_ptr(),
      rows.stride(0),
      rows.size(1),
      top_k,
      dense_bias.defined() ? dense_bias.const_data_ptr() : nullptr,
      normalize,
      scale,
      weights.mutable_data_ptr(),
      experts.mutable_data_ptr<int64_t>()};
  const auto route_rows = route_tokens_loops().route_rows[static_cast<int>(storage_of(rows))][static_cast<int>(scores)];
  at::parallel_for(
      0, rows.size(0), grain_rows(rows.size(1)), [&](int64_t begin, int64_t end) { route_rows(task, begin, end); });
  return {weights, experts};
}

at::Tensor route_tokens_backward_cpu(
    const at::Tensor& grad_weights,
    const at::Tensor& logits,
    const at::Tensor& experts,
    std::string_view scores_name,
    bool normalize,
    double scale) {
  const Scores scores = check_route_tokens_backward(grad_weights, logits, experts, scores_name);
  check_memory("edl::route_tokens", grad_weights, logits, experts);
  const at::Tensor rows = with_dense_rows(logits);
  const at::Tensor dense_grad = grad_weights.contiguous();
  const at::Tensor dense_experts = experts.contiguous();
  const int64_t* ids = dense_experts.const_data_ptr<int64_t>();
  const int64_t num_experts = rows.size(1);
  EDL_ENSURE_INDEX(
      std::all_of(ids, ids + dense_experts.numel(), [=](int64_t id) { return id >= 0 && id < num_experts; }),
      "edl::_route_tokens_backward: experts must be at least 0 and below ", num_experts, ", the number of experts");
  at::Tensor grad_logits = at::empty(logits.sizes(), logits.options().memory_format(at::MemoryFormat::Contiguous));
  const RouteGradient gradient{
      dense_grad.const_data_ptr(),
      rows.const_data_ptr(),
      rows.stride(0),
      num_experts,
      experts.size(1),
      ids,
      normalize,
      scale,
      grad_logits.mutable_data_ptr()};
  const auto spread_rows =
      route_tokens_loops().spread_rows[static_cast<int>(storage_of(rows))][static_cast<int>(scores)];
  at::parallel_for(
      0, rows.size(0), grain_rows(num_experts), [&](int64_t begin, int64_t end) { spread_rows(gradient, begin, end); });
  return grad_logits;
}

} // namespace
} // namespace edl::cpu

TORCH_LIBRARY_IMPL(edl, CPU, m) {
  m.impl("route_tokens", edl::cpu::route_tokens_cpu);
  m.impl("_route_tokens_backward", edl::cpu::route_tokens_backward_cpu);
}
