// labels → token: the segment of every token where each sequence is one. labels [B] int32 or int64, T → ids [T] int32:
// token t belongs to sequence t / (T / B), and to none (-1) where that has the label -1.
#include "ops/sequence_segment_ids.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/eq.h>
#include <torch/library.h>

#include "common/dtypes.h"
#include "common/errors.h"
#include "common/operators.h"

namespace edl {
namespace {

constexpr const char* kOp = "edl::sequence_segment_ids";

} // namespace

void check_sequence_segment_ids(const at::Tensor& labels, const c10::SymInt& num_tokens) {
  EDL_ENSURE(
      labels.dim() == 1 && is_index_type(labels.scalar_type()), kOp,
      ": labels must be int32 or int64 of the shape [B] (got ", labels.dim(), " dimensions of ", labels.scalar_type(),
      ")");
  EDL_ENSURE(num_tokens.sym_ge(0), kOp, ": num_tokens must not be negative (got ", num_tokens, ")");
  EDL_ENSURE(
      ((num_tokens / labels.sym_size(0).max(1)) * labels.sym_size(0)).sym_eq(num_tokens), kOp,
      ": the tokens must be a whole number of sequences of one length (got ", num_tokens, " tokens for ",
      labels.sym_size(0), " sequences)");
}

at::Tensor sequence_segment_ids(const at::Tensor& labels, c10::SymInt num_tokens) {
  static const auto op = find_operator<decltype(sequence_segment_ids)>("edl::sequence_segment_ids");
  return op.call(labels, std::move(num_tokens));
}

namespace {

// On any device but the CPU, where these small operators cost more than the sums of a small batch.
at::Tensor sequence_segment_ids_of_operators(const at::Tensor& labels, c10::SymInt num_tokens) {
  check_sequence_segment_ids(labels, num_tokens);
  const c10::SymInt batch = labels.sym_size(0);
  const at::Tensor sequences = at::arange(batch, labels.options().dtype(at::kInt)).masked_fill_(at::eq(labels, -1), -1);
  return sequences.unsqueeze(1).expand_symint({batch, num_tokens / batch.max(1)}).reshape(-1);
}

} // namespace
} // namespace edl

TORCH_LIBRARY_FRAGMENT(edl, m) {
  m.def("sequence_segment_ids(Tensor labels, SymInt num_tokens) -> Tensor");
}

TORCH_LIBRARY_IMPL(edl, CompositeExplicitAutograd, m) {
  m.impl("sequence_segment_ids", edl::sequence_segment_ids_of_operators);
}

// Labels in, ids out.
TORCH_LIBRARY_IMPL(edl, Autograd, m) {
  m.impl("sequence_segment_ids", torch::CppFunction::makeFallthrough());
}
