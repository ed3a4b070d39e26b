// The matrix of Jensen-Shannon divergences between domains: what the loss pushes up, pair by pair.
#include "ops/pairwise_divergence.h"

#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "common/errors.h"
#include "common/operators.h"
#include "ops/expert_divergence.h"

namespace edl {

void check_pairwise_divergence(
    const at::Tensor& sums, const at::Tensor& counts, const std::optional<at::Tensor>& squares) {
  check_moments("edl::pairwise_divergence", sums, counts, squares);
}

at::Tensor pairwise_divergence(
    const at::Tensor& sums, const at::Tensor& counts, const std::optional<at::Tensor>& squares) {
  static const auto op = find_operator<decltype(pairwise_divergence)>("edl::pairwise_divergence");
  return op.call(sums, counts, squares);
}

namespace {

at::Tensor pairwise_divergence_meta(
    const at::Tensor& sums, const at::Tensor& counts, const std::optional<at::Tensor>& squares) {
  check_pairwise_divergence(sums, counts, squares);
  c10::SymDimVector shape(sums.sym_sizes().begin(), sums.sym_sizes().end());
  shape.back() = sums.sym_size(-2);
  return at::empty_symint(shape, sums.options());
}

} // namespace
} // namespace edl

TORCH_LIBRARY_FRAGMENT(edl, m) {
  m.def("pairwise_divergence(Tensor sums, Tensor counts, Tensor? squares=None) -> Tensor");
}

TORCH_LIBRARY_IMPL(edl, Meta, m) {
  m.impl("pairwise_divergence", edl::pairwise_divergence_meta);
}

TORCH_LIBRARY_IMPL(edl, Autograd, m) {
  m.impl("pairwise_divergence", torch::autograd::autogradNotImplementedFallback());
}
