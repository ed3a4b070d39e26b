// token → segment, for statistics: choices, scores, and how sure tokens are of them.
#include "ops/routing_sums.h"

#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "common/dtypes.h"
#include "common/errors.h"
#include "ops/tensor_checks.h"

namespace edl {
namespace {

void check_rows(
    std::string_view op,
    const at::Tensor& rows,
    const char* name,
    const at::Tensor& segment_ids,
    const c10::SymInt& columns,
    const char* shape) {
  check_dimensions(op, rows, name, 2, shape);
  check_device(op, rows, name, segment_ids, "segment_ids");
  EDL_ENSURE(
      rows.sym_size(0).sym_eq(segment_ids.sym_size(0)) & rows.sym_size(1).sym_eq(columns), op, ": ", name,
      " must have the shape ", shape, " of the ids, num_experts and top_k (got ", rows.sym_sizes(), " for ",
      segment_ids.sym_size(0), " ids and ", columns, ")");
}

} // namespace

Scores check_routing_sums(
    std::string_view op,
    const std::optional<at::Tensor>& routing,
    const std::optional<at::Tensor>& experts,
    const at::Tensor& segment_ids,
    const c10::SymInt& num_segments,
    const c10::SymInt& num_experts,
    int64_t top_k,
    std::string_view scores) {
  check_dimensions(op, segment_ids, "segment_ids", 1, "[T]");
  EDL_ENSURE(
      is_index_type(segment_ids.scalar_type()), op, ": segment_ids must be int32 or int64 (got ",
      segment_ids.scalar_type(), ")");
  EDL_ENSURE(num_segments.sym_ge(0), op, ": num_segments must not be negative (got ", num_segments, ")");
  EDL_ENSURE(top_k >= 1, op, ": top_k must be at least 1 (got ", top_k, ")");
  EDL_ENSURE(
      num_experts.sym_ge(top_k), op, ": top_k must not exceed the number of experts (got ", top_k, " of ", num_experts,
      ")");
  EDL_ENSURE(routing.has_value() || experts.has_value(), op, ": routing or experts must be given (got neither)");
  if (routing.has_value()) {
    check_rows(op, *routing, "routing", segment_ids, num_experts, "[T, E]");
    check_storage_type(op, *routing, "routing");
  }
  if (experts.has_value()) {
    check_rows(op, *experts, "experts", segment_ids, top_k, "[T, K]");
    EDL_ENSURE(
        is_index_type(experts->scalar_type()), op, ": experts must be int32 or int64 (got ", experts->scalar_type(),
        ")");
  }
  return parse_scores(op, scores);
}

namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> routing_sums_meta(
    const std::optional<at::Tensor>& routing,
    const std::optional<at::Tensor>& experts,
    const at::Tensor& segment_ids,
    c10::SymInt num_segments,
    c10::SymInt num_experts,
    int64_t top_k,
    std::string_view scores,
    std::string_view op) {
  check_routing_sums(op, routing, experts, segment_ids, num_segments, num_experts, top_k, scores);
  const auto counts = segment_ids.options().dtype(at::kLong), sums = segment_ids.options().dtype(at::kDouble);
  return {
      at::empty_symint({num_segments, num_experts}, counts),
      at::empty_symint({num_segments, num_experts}, sums),
      at::empty_symint({num_segments}, counts),
      at::empty_symint({num_experts, num_experts}, counts),
      at::empty_symint({num_segments}, sums),
      at::empty_symint({num_segments}, sums)};
}

} // namespace
} // namespace edl

TORCH_LIBRARY_FRAGMENT(edl, m) {
  m.def(
      "_routing_sums(Tensor? routing, Tensor? experts, Tensor segment_ids, SymInt num_segments, SymInt num_experts, "
      "int top_k, str scores, *, str caller='edl::_routing_sums') -> (Tensor choices, Tensor mass, Tensor tokens, "
      "Tensor coactivation, Tensor entropy, Tensor margin)");
}

TORCH_LIBRARY_IMPL(edl, Meta, m) {
  m.impl("_routing_sums", edl::routing_sums_meta);
}

TORCH_LIBRARY_IMPL(edl, Autograd, m) {
  m.impl("_routing_sums", torch::autograd::autogradNotImplementedFallback());
}
