// slots by expert: row_order and offsets, the index space in which the experts work.
#include "ops/sort_by_expert.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <limits>

#include "common/dtypes.h"
#include "common/errors.h"
#include "common/operators.h"
#include "ops/tensor_checks.h"

namespace edl {
namespace {

constexpr const char* kOp = "edl::sort_by_expert";
constexpr int64_t kMostSlots = std::numeric_limits<int32_t>::max();

} // namespace

void check_sort_by_expert(std::string_view op, const at::Tensor& experts, const c10::SymInt& num_experts) {
  check_dimensions(op, experts, "experts", 2, "[T, K]");
  EDL_ENSURE(
      is_index_type(experts.scalar_type()), op, ": experts must be int32 or int64 (got ", experts.scalar_type(), ")");
  EDL_ENSURE(
      num_experts.sym_ge(1) & num_experts.sym_lt(kMostSlots), op,
      ": num_experts must be at least 1 and below 2^31 - 1 "
      "(got ",
      num_experts, ")");
  // A symbolic size would turn this into a bound on the batch that users of torch.export had to state.
  if (const auto num_slots = experts.sym_numel().maybe_as_int()) {
    EDL_ENSURE(*num_slots <= kMostSlots, op, ": experts must have fewer than 2^31 entries (got ", *num_slots, ")");
  }
}

std::tuple<at::Tensor, at::Tensor> sort_by_expert_for(
    const at::Tensor& experts, c10::SymInt num_experts, std::string_view op) {
  static const auto registered = find_operator<decltype(sort_by_expert_for)>(kOp);
  return registered.call(experts, std::move(num_experts), op);
}

std::tuple<at::Tensor, at::Tensor> sort_by_expert(const at::Tensor& experts, c10::SymInt num_experts) {
  return sort_by_expert_for(experts, std::move(num_experts), kOp);
}

namespace {

std::tuple<at::Tensor, at::Tensor> sort_by_expert_meta(
    const at::Tensor& experts, c10::SymInt num_experts, std::string_view op) {
  check_sort_by_expert(op, experts, num_experts);
  const auto options = experts.options().dtype(at::kInt);
  return {at::empty_symint({experts.sym_numel()}, options), at::empty_symint({num_experts + 1}, options)};
}

} // namespace
} // namespace edl

TORCH_LIBRARY_FRAGMENT(edl, m) {
  m.def(
      "sort_by_expert(Tensor experts, SymInt num_experts, *, str caller='edl::sort_by_expert') -> "
      "(Tensor row_order, Tensor offsets)");
}

TORCH_LIBRARY_IMPL(edl, Meta, m) {
  m.impl("sort_by_expert", edl::sort_by_expert_meta);
}

// Indices in, indices out.
TORCH_LIBRARY_IMPL(edl, Autograd, m) {
  m.impl("sort_by_expert", torch::CppFunction::makeFallthrough());
}
