// labels → token: the segment of every token where each sequence is one. labels [B] int32 or int64, T → ids [T] int32:
// token t belongs to sequence t / (T / B), and to none (-1) where that has the label -1.
#include "ops/sequence_segment_ids.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/eq.h>
#include <torch/library.h>

#include "common/dtypes.h"
#include "common/errors.h"

namespace edl {

void check_sequence_segment_ids(const at::Tensor& labels, const c10::SymInt& num_tokens) {
  EDL_CHECK(
      labels.dim() == 1 && is_index_type(labels.scalar_type()),
      "edl::_sequence_segment_ids: labels must be int32 or int64 of the shape [B] (got ", labels.dim(),
      " dimensions of ", labels.scalar_type(), ")");
  EDL_CHECK(
      (num_tokens % labels.sym_size(0).max(1)).sym_eq(0),
      "edl::_sequence_segment_ids: the tokens must be a whole number of sequences of one length (got ", num_tokens,
      " tokens for ", labels.sym_size(0), " sequences)");
}

namespace {

// On any device but the CPU, where these small operators cost more than the sums of a small batch.
at::Tensor sequence_segment_ids(const at::Tensor& labels, c10::SymInt num_tokens) {
  check_sequence_segment_ids(labels, num_tokens);
  const c10::SymInt batch = labels.sym_size(0);
  const at::Tensor sequences = at::arange(batch, labels.options().dtype(at::kInt)).masked_fill_(at::eq(labels, -1), -1);
  return sequences.unsqueeze(1).expand_symint({batch, num_tokens / batch.max(1)}).reshape(-1);
}

} // namespace
} // namespace edl

TORCH_LIBRARY_FRAGMENT(edl, m) {
  m.def("_sequence_segment_ids(Tensor labels, SymInt num_tokens) -> Tensor");
}

TORCH_LIBRARY_IMPL(edl, CompositeExplicitAutograd, m) {
  m.impl("_sequence_segment_ids", edl::sequence_segment_ids);
}

// Labels in, ids out.
TORCH_LIBRARY_IMPL(edl, Autograd, m) {
  m.impl("_sequence_segment_ids", torch::CppFunction::makeFallthrough());
}
