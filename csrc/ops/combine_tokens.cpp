// row → token: the (weighted) sum of a token's rows.
#include "ops/combine_tokens.h"

#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "common/operators.h"
#include "common/tensors.h"
#include "ops/dispatch_tokens.h"
#include "ops/routing_checks.h"
#include "ops/tensor_checks.h"

namespace edl {
namespace {

constexpr const char* kOp = "edl::combine_tokens";

} // namespace

void check_combine_tokens(
    const at::Tensor& rows, const std::optional<at::Tensor>& weights, const at::Tensor& row_order, int64_t top_k) {
  check_rows_of_tokens(kOp, rows, weights, row_order, top_k);
}

void check_combine_tokens_backward(
    const at::Tensor& grad_output,
    const at::Tensor& rows,
    const std::optional<at::Tensor>& weights,
    const at::Tensor& row_order,
    int64_t top_k) {
  check_combine_tokens(rows, weights, row_order, top_k);
  check_form(
      kOp, grad_output, "the gradient of the output", rows.scalar_type(),
      {num_tokens_of(rows, weights, top_k), rows.sym_size(1)});
}

at::Tensor combine_tokens(
    const at::Tensor& rows, const std::optional<at::Tensor>& weights, const at::Tensor& row_order, int64_t top_k) {
  static const auto op = find_operator<decltype(combine_tokens)>("edl::combine_tokens");
  return op.call(rows, weights, row_order, top_k);
}

namespace {

using TwoGradients = std::tuple<at::Tensor, at::Tensor>;

TwoGradients combine_tokens_backward(
    const at::Tensor& grad_output,
    const at::Tensor& rows,
    const std::optional<at::Tensor>& weights,
    const at::Tensor& row_order,
    int64_t top_k,
    std::array<bool, 2> needed) {
  static const auto op = find_operator<decltype(combine_tokens_backward)>("edl::_combine_tokens_backward");
  return op.call(grad_output, rows, weights, row_order, top_k, needed);
}

at::Tensor combine_tokens_meta(
    const at::Tensor& rows, const std::optional<at::Tensor>& weights, const at::Tensor& row_order, int64_t top_k) {
  check_combine_tokens(rows, weights, row_order, top_k);
  return at::empty_symint({num_tokens_of(rows, weights, top_k), rows.sym_size(1)}, rows.options());
}

TwoGradients combine_tokens_backward_meta(
    const at::Tensor& grad_output,
    const at::Tensor& rows,
    const std::optional<at::Tensor>& weights,
    const at::Tensor& row_order,
    int64_t top_k,
    std::array<bool, 2> needed) {
  check_combine_tokens_backward(grad_output, rows, weights, row_order, top_k);
  return {empty_if(needed[0], rows), empty_if(needed[1] && weights.has_value(), weights.value_or(rows))};
}

struct CombineTokensFunction : torch::autograd::Function<CombineTokensFunction> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(
      torch::autograd::AutogradContext* context,
      const at::Tensor& rows,
      const std::optional<at::Tensor>& weights,
      const at::Tensor& row_order,
      int64_t top_k) {
    at::AutoDispatchBelowADInplaceOrView guard;
    if (weights.has_value()) {
      context->save_for_backward({row_order, rows, *weights});
    } else {
      context->save_for_backward({row_order});
    }
    context->saved_data["top_k"] = top_k;
    return combine_tokens(rows, weights, row_order, top_k);
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* context, const torch::autograd::variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const int64_t top_k = context->saved_data["top_k"].toInt();
    if (saved.size() == 1) { // no weights: the op is linear in its rows
      return {context->needs_input_grad(0) ? dispatch_tokens(grads[0], saved[0], top_k) : at::Tensor(), {}, {}, {}};
    }
    const std::array<bool, 2> needed = {context->needs_input_grad(0), context->needs_input_grad(1)};
    auto [grad_rows, grad_weights] = combine_tokens_backward(grads[0], saved[1], saved[2], saved[0], top_k, needed);
    return {needed[0] ? grad_rows : at::Tensor(), needed[1] ? grad_weights : at::Tensor(), {}, {}};
  }
};

at::Tensor combine_tokens_autograd(
    const at::Tensor& rows, const std::optional<at::Tensor>& weights, const at::Tensor& row_order, int64_t top_k) {
  return CombineTokensFunction::apply(rows, weights, row_order, top_k);
}

} // namespace
} // namespace edl

TORCH_LIBRARY_FRAGMENT(edl, m) {
  m.def("combine_tokens(Tensor rows, Tensor? weights, Tensor row_order, int top_k) -> Tensor");
  m.def(
      "_combine_tokens_backward(Tensor grad_output, Tensor rows, Tensor? weights, Tensor row_order, int top_k, "
      "bool[2] needed) -> (Tensor grad_rows, Tensor grad_weights)");
}

TORCH_LIBRARY_IMPL(edl, Meta, m) {
  m.impl("combine_tokens", edl::combine_tokens_meta);
  m.impl("_combine_tokens_backward", edl::combine_tokens_backward_meta);
}

TORCH_LIBRARY_IMPL(edl, Autograd, m) {
  m.impl("combine_tokens", edl::combine_tokens_autograd);
  m.impl("_combine_tokens_backward", torch::autograd::autogradNotImplementedFallback());
}
