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

void check_sort_by_expert(const at::Tensor& experts, const c10::SymInt& num_experts) {
  check_dimensions(kOp, experts, "experts", 2, "[T, K]");
  EDL_ENSURE(
      is_index_type(experts.scalar_type()), kOp, ": experts must be int32 or int64 (got ", experts.scalar_type(), ")");
  EDL_ENSURE(
      num_experts.sym_ge(1) & num_experts.sym_lt(kMostSlots), kOp,
      ": num_experts must be at least 1 and below 2^31 - 1 "
      "(got ",
      num_experts, ")");
  // A symbolic size would turn this into a bound on the batch that users of torch.export had to state.
  if (const auto num_slots = experts.sym_numel().maybe_as_int()) {
    EDL_ENSURE(*num_slots <= kMostSlots, kOp, ": experts must have fewer than 2^31 entries (got ", *num_slots, ")");
  }
}

std::tuple<at::Tensor, at::Tensor> sort_by_expert(const at::Tensor& experts, c10::SymInt num_experts) {
  static const auto op = find_operator<decltype(sort_by_expert)>("edl::sort_by_expert");
  return op.call(experts, std::move(num_experts));
}

namespace {

std::tuple<at::Tensor, at::Tensor> sort_by_expert_meta(const at::Tensor& experts, c10::SymInt num_experts) {
  check_sort_by_expert(experts, num_experts);
  const auto options = experts.options().dtype(at::kInt);
  return {at::empty_symint({experts.sym_numel()}, options), at::empty_symint({num_experts + 1}, options)};
}

} // namespace
} // namespace edl

TORCH_LIBRARY_FRAGMENT(edl, m) {
  m.def("sort_by_expert(Tensor experts, SymInt num_experts) -> (Tensor row_order, Tensor offsets)");
}

TORCH_LIBRARY_IMPL(edl, Meta, m) {
  m.impl("sort_by_expert", edl::sort_by_expert_meta);
}

// Indices in, indices out.
TORCH_LIBRARY_IMPL(edl, Autograd, m) {
  m.impl("sort_by_expert", torch::CppFunction::makeFallthrough());
}
