// row → token: the inner products of a token's rows.
#include "ops/token_gram.h"

#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "common/dtypes.h"
#include "common/operators.h"
#include "ops/routing_checks.h"
#include "ops/tensor_checks.h"

namespace edl {
namespace {

constexpr const char* kOp = "edl::token_gram";

} // namespace

void check_token_gram(
    const at::Tensor& rows, const std::optional<at::Tensor>& weights, const at::Tensor& row_order, int64_t top_k) {
  check_rows_of_tokens(kOp, rows, weights, row_order, top_k);
}

void check_token_gram_backward(
    const at::Tensor& grad_gram,
    const at::Tensor& rows,
    const std::optional<at::Tensor>& weights,
    const at::Tensor& row_order,
    int64_t top_k) {
  check_token_gram(rows, weights, row_order, top_k);
  check_form(
      kOp, grad_gram, "the gradient of the result", accumulation_type(rows.scalar_type()),
      {num_tokens_of(rows, weights, top_k), top_k, top_k});
}

at::Tensor token_gram(
    const at::Tensor& rows, const std::optional<at::Tensor>& weights, const at::Tensor& row_order, int64_t top_k) {
  static const auto op = find_operator<decltype(token_gram)>("edl::token_gram");
  return op.call(rows, weights, row_order, top_k);
}

namespace {

at::Tensor token_gram_backward(
    const at::Tensor& grad_gram,
    const at::Tensor& rows,
    const std::optional<at::Tensor>& weights,
    const at::Tensor& row_order,
    int64_t top_k) {
  static const auto op = find_operator<decltype(token_gram_backward)>("edl::_token_gram_backward");
  return op.call(grad_gram, rows, weights, row_order, top_k);
}

at::Tensor token_gram_meta(
    const at::Tensor& rows, const std::optional<at::Tensor>& weights, const at::Tensor& row_order, int64_t top_k) {
  check_token_gram(rows, weights, row_order, top_k);
  const auto options = rows.options().dtype(accumulation_type(rows.scalar_type()));
  return at::empty_symint({num_tokens_of(rows, weights, top_k), top_k, top_k}, options);
}

at::Tensor token_gram_backward_meta(
    const at::Tensor& grad_gram,
    const at::Tensor& rows,
    const std::optional<at::Tensor>& weights,
    const at::Tensor& row_order,
    int64_t top_k) {
  check_token_gram_backward(grad_gram, rows, weights, row_order, top_k);
  return at::empty_symint(rows.sym_sizes(), rows.options());
}

struct TokenGramFunction : torch::autograd::Function<TokenGramFunction> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(
      torch::autograd::AutogradContext* context,
      const at::Tensor& rows,
      const std::optional<at::Tensor>& weights,
      const at::Tensor& row_order,
      int64_t top_k) {
    at::AutoDispatchBelowADInplaceOrView guard;
    context->save_for_backward({rows, row_order, weights.value_or(at::Tensor())});
    context->saved_data["top_k"] = top_k;
    return token_gram(rows, weights, row_order, top_k);
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* context, const torch::autograd::variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const auto weights = saved[2].defined() ? std::make_optional(saved[2]) : std::nullopt;
    return {
        token_gram_backward(grads[0], saved[0], weights, saved[1], context->saved_data["top_k"].toInt()), {}, {}, {}};
  }
};

at::Tensor token_gram_autograd(
    const at::Tensor& rows, const std::optional<at::Tensor>& weights, const at::Tensor& row_order, int64_t top_k) {
  if (!needs_gradient(rows)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return token_gram(rows, weights, row_order, top_k);
  }
  return TokenGramFunction::apply(rows, weights, row_order, top_k);
}

} // namespace
} // namespace edl

TORCH_LIBRARY_FRAGMENT(edl, m) {
  m.def("token_gram(Tensor rows, Tensor? weights, Tensor row_order, int top_k) -> Tensor");
  m.def("_token_gram_backward(Tensor grad_gram, Tensor rows, Tensor? weights, Tensor row_order, int top_k) -> Tensor");
}

TORCH_LIBRARY_IMPL(edl, Meta, m) {
  m.impl("token_gram", edl::token_gram_meta);
  m.impl("_token_gram_backward", edl::token_gram_backward_meta);
}

TORCH_LIBRARY_IMPL(edl, Autograd, m) {
  m.impl("token_gram", edl::token_gram_autograd);
  m.impl("_token_gram_backward", torch::autograd::autogradNotImplementedFallback());
}
