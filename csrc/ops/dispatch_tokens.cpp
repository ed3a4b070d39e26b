// token → row: each token once for every expert that it chose, in the order of the experts.
#include "ops/dispatch_tokens.h"

#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "common/errors.h"
#include "common/operators.h"
#include "ops/combine_tokens.h"
#include "ops/routing_checks.h"
#include "ops/tensor_checks.h"

namespace edl {
namespace {

constexpr const char* kOp = "edl::dispatch_tokens";

} // namespace

void check_dispatch_tokens(const at::Tensor& tokens, const at::Tensor& row_order, int64_t top_k) {
  check_dimensions(kOp, tokens, "tokens", 2, "[T, H]");
  check_storage_type(kOp, tokens, "tokens");
  check_sorted_indices(kOp, row_order, "row_order", tokens, "tokens");
  EDL_ENSURE(top_k >= 1, kOp, ": top_k must be at least 1 (got ", top_k, ")");
  EDL_ENSURE(
      row_order.sym_size(0).sym_eq(tokens.sym_size(0) * top_k), kOp,
      ": row_order must have top_k entries per token (got ", row_order.sym_size(0), " for ", tokens.sym_size(0),
      " tokens and top_k ", top_k, ")");
}

at::Tensor dispatch_tokens(const at::Tensor& tokens, const at::Tensor& row_order, int64_t top_k) {
  static const auto op = find_operator<decltype(dispatch_tokens)>("edl::dispatch_tokens");
  return op.call(tokens, row_order, top_k);
}

namespace {

at::Tensor dispatch_tokens_meta(const at::Tensor& tokens, const at::Tensor& row_order, int64_t top_k) {
  check_dispatch_tokens(tokens, row_order, top_k);
  return at::empty_symint({row_order.sym_size(0), tokens.sym_size(1)}, tokens.options());
}

struct DispatchTokensFunction : torch::autograd::Function<DispatchTokensFunction> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(
      torch::autograd::AutogradContext* context, const at::Tensor& tokens, const at::Tensor& row_order, int64_t top_k) {
    at::AutoDispatchBelowADInplaceOrView guard;
    context->save_for_backward({row_order});
    context->saved_data["top_k"] = top_k;
    return dispatch_tokens(tokens, row_order, top_k);
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* context, const torch::autograd::variable_list& grads) {
    at::Tensor grad_tokens;
    if (grads[0].defined() && context->needs_input_grad(0)) {
      grad_tokens = combine_tokens(
          grads[0], std::nullopt, context->get_saved_variables()[0], context->saved_data["top_k"].toInt());
    }
    return {grad_tokens, {}, {}};
  }
};

at::Tensor dispatch_tokens_autograd(const at::Tensor& tokens, const at::Tensor& row_order, int64_t top_k) {
  return DispatchTokensFunction::apply(tokens, row_order, top_k);
}

} // namespace
} // namespace edl

TORCH_LIBRARY_FRAGMENT(edl, m) {
  m.def("dispatch_tokens(Tensor tokens, Tensor row_order, int top_k) -> Tensor");
}

TORCH_LIBRARY_IMPL(edl, Meta, m) {
  m.impl("dispatch_tokens", edl::dispatch_tokens_meta);
}

TORCH_LIBRARY_IMPL(edl, Autograd, m) {
  m.impl("dispatch_tokens", edl::dispatch_tokens_autograd);
}
