// token → logits: the router's linear layer in a type of its own, which autocast leaves alone. (A context that switches
// autocast off does not exist in TorchScript, and leaves a trace in exported programs.)
//
// On CUDA the float32 layer is an operator of its own, `_router_product`, for what torch's linear layer would lose:
// tokens and weight in bfloat16 are multiplied as they are, with float32 sums (their products are exact in float32), so
// that no float32 copy of the tokens exists, nor is kept for the backward pass; and torch.set_float32_matmul_precision
// does not reach it, as TF32 would change which experts are the highest. The gradient of the logits becomes two bfloat16
// numbers, high + low, which leave out 2^-16 of it at most.
#include <ATen/Context.h>
#include <ATen/ops/add.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sub.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "common/operators.h"
#include "common/tensors.h"

namespace edl {
namespace {

using TwoGradients = std::tuple<at::Tensor, at::Tensor>;

at::Tensor router_product(const at::Tensor& tokens, const at::Tensor& weight) {
  static const auto op = find_operator<decltype(router_product)>("edl::_router_product");
  return op.call(tokens, weight);
}

TwoGradients router_product_backward(
    const at::Tensor& grad, const at::Tensor& tokens, const at::Tensor& weight, std::array<bool, 2> needed) {
  static const auto op = find_operator<decltype(router_product_backward)>("edl::_router_product_backward");
  return op.call(grad, tokens, weight, needed);
}

// tokens [T, H], weight [E, H] → [T, E] in `type`, float64 for float64 tokens.
at::Tensor router_logits(const at::Tensor& tokens, const at::Tensor& weight, at::ScalarType type) {
  const at::ScalarType own = tokens.scalar_type() == at::kDouble ? at::kDouble : type;
  if (tokens.is_cuda() && own == at::kFloat && tokens.dim() == 2) {
    return router_product(tokens, weight);
  }
  return at::linear(tokens.to(own), weight.to(own));
}

template <c10::DispatchKey key>
at::Tensor router_logits_autocast(const at::Tensor& tokens, const at::Tensor& weight, at::ScalarType type) {
  c10::impl::ExcludeDispatchKeyGuard guard(key);
  return router_logits(tokens, weight, type);
}

bool are_bfloat16(const at::Tensor& tokens, const at::Tensor& weight) {
  return tokens.scalar_type() == at::kBFloat16 && weight.scalar_type() == at::kBFloat16;
}

// The float32 product of matrices in bfloat16; torch has it on CUDA alone.
at::Tensor wide_product(const at::Tensor& left, const at::Tensor& right) {
  return left.is_cuda() ? at::mm(left, right, at::kFloat) : at::mm(left.to(at::kFloat), right.to(at::kFloat));
}

at::Tensor router_product_any(const at::Tensor& tokens, const at::Tensor& weight) {
  const at::NoTF32Guard without_tf32;
  return are_bfloat16(tokens, weight) ? wide_product(tokens, weight.t())
                                      : at::mm(tokens.to(at::kFloat), weight.to(at::kFloat).t());
}

// grad = high + low: [T, 2, E] bfloat16.
at::Tensor high_and_low(const at::Tensor& grad) {
  at::Tensor parts = at::empty({grad.size(0), 2, grad.size(1)}, grad.options().dtype(at::kBFloat16));
  const at::Tensor high = parts.select(1, 0);
  at::Tensor low = parts.select(1, 1);
  high.copy_(grad);
  at::sub_out(low, grad, high);
  return parts;
}

TwoGradients router_product_backward_any(
    const at::Tensor& grad, const at::Tensor& tokens, const at::Tensor& weight, std::array<bool, 2> needed) {
  const at::NoTF32Guard without_tf32;
  at::Tensor grad_tokens = at::empty({0}, tokens.options());
  at::Tensor grad_weight = at::empty({0}, weight.options());
  if (!are_bfloat16(tokens, weight)) {
    if (needed[0]) {
      grad_tokens = at::mm(grad, weight.to(at::kFloat)).to(tokens.scalar_type());
    }
    if (needed[1]) {
      grad_weight = at::mm(grad.t(), tokens.to(at::kFloat)).to(weight.scalar_type());
    }
    return {grad_tokens, grad_weight};
  }
  const int64_t num_experts = grad.size(1);
  const at::Tensor parts = high_and_low(grad).view({grad.size(0), 2 * num_experts});
  if (needed[0]) {
    grad_tokens = at::mm(parts, at::cat({weight, weight}));
  }
  if (needed[1]) {
    const at::Tensor of_parts = wide_product(parts.t(), tokens);
    grad_weight = at::empty(weight.sizes(), weight.options().memory_format(at::MemoryFormat::Contiguous));
    at::add_out(grad_weight, of_parts.narrow(0, 0, num_experts), of_parts.narrow(0, num_experts, num_experts));
  }
  return {grad_tokens, grad_weight};
}

at::Tensor router_product_meta(const at::Tensor& tokens, const at::Tensor& weight) {
  TORCH_CHECK_VALUE(
      tokens.dim() == 2 && weight.dim() == 2, "edl::router: tokens and weight must be matrices (got ", tokens.dim(),
      " and ", weight.dim(), " dimensions)");
  return at::empty_symint({tokens.sym_size(0), weight.sym_size(0)}, tokens.options().dtype(at::kFloat));
}

TwoGradients router_product_backward_meta(
    const at::Tensor& grad, const at::Tensor& tokens, const at::Tensor& weight, std::array<bool, 2> needed) {
  return {empty_if(needed[0], tokens), empty_if(needed[1], weight)};
}

struct RouterProductFunction : torch::autograd::Function<RouterProductFunction> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(
      torch::autograd::AutogradContext* context, const at::Tensor& tokens, const at::Tensor& weight) {
    at::AutoDispatchBelowADInplaceOrView guard;
    context->save_for_backward({tokens, weight});
    return router_product(tokens, weight);
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* context, const torch::autograd::variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const std::array<bool, 2> needed = {context->needs_input_grad(0), context->needs_input_grad(1)};
    auto [grad_tokens, grad_weight] = router_product_backward(grads[0], saved[0], saved[1], needed);
    return {needed[0] ? grad_tokens : at::Tensor(), needed[1] ? grad_weight : at::Tensor()};
  }
};

at::Tensor router_product_autograd(const at::Tensor& tokens, const at::Tensor& weight) {
  return RouterProductFunction::apply(tokens, weight);
}

} // namespace
} // namespace edl

TORCH_LIBRARY_FRAGMENT(edl, m) {
  m.def("_router_logits(Tensor tokens, Tensor weight, ScalarType dtype) -> Tensor");
  m.def("_router_product(Tensor tokens, Tensor weight) -> Tensor");
  m.def(
      "_router_product_backward(Tensor grad, Tensor tokens, Tensor weight, bool[2] needed) -> (Tensor grad_tokens, "
      "Tensor grad_weight)");
}

// Made of ATen ops: no kernel of our own on any device.
TORCH_LIBRARY_IMPL(edl, CompositeImplicitAutograd, m) {
  m.impl("_router_logits", edl::router_logits);
}

TORCH_LIBRARY_IMPL(edl, CompositeExplicitAutograd, m) {
  m.impl("_router_product", edl::router_product_any);
  m.impl("_router_product_backward", edl::router_product_backward_any);
}

TORCH_LIBRARY_IMPL(edl, Meta, m) {
  m.impl("_router_product", edl::router_product_meta);
  m.impl("_router_product_backward", edl::router_product_backward_meta);
}

TORCH_LIBRARY_IMPL(edl, Autograd, m) {
  m.impl("_router_product", edl::router_product_autograd);
  m.impl("_router_product_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(edl, AutocastCPU, m) {
  m.impl("_router_logits", edl::router_logits_autocast<c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(edl, Autocast, m) { // CUDA
  m.impl("_router_logits", edl::router_logits_autocast<c10::DispatchKey::AutocastCUDA>);
}
