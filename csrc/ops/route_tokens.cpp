// token → experts: the top_k experts of each row of logits, and their weights.
#include "ops/route_tokens.h"

#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "common/dtypes.h"
#include "common/errors.h"
#include "common/operators.h"

namespace edl {
namespace {

constexpr const char* kOp = "edl::route_tokens";

Scores check_logits(const at::Tensor& logits, std::string_view scores) {
  EDL_ENSURE(logits.dim() == 2, kOp, ": logits must have the shape [T, E] (got ", logits.dim(), " dimensions)");
  EDL_ENSURE(
      is_storage_type(logits.scalar_type()), kOp, ": logits must be float32, float64, bfloat16 or float16 (got ",
      logits.scalar_type(), ")");
  return parse_router_scores(kOp, scores);
}

void check_bias(const at::Tensor& bias, const at::Tensor& logits) {
  EDL_ENSURE(bias.dim() == 1, kOp, ": bias must have the shape [E] (got ", bias.dim(), " dimensions)");
  EDL_ENSURE(
      is_storage_type(bias.scalar_type()), kOp, ": bias must be float32, float64, bfloat16 or float16 (got ",
      bias.scalar_type(), ")");
  EDL_ENSURE(
      bias.device() == logits.device(), kOp, ": bias must be on the device of logits (got ", bias.device(), " and ",
      logits.device(), ")");
  EDL_ENSURE(
      bias.sym_size(0).sym_eq(logits.sym_size(1)), kOp, ": bias must have one entry per expert (got ", bias.sym_size(0),
      " for ", logits.sym_size(1), " experts)");
}

void check_allowed(const at::Tensor& allowed, const at::Tensor& logits) {
  EDL_ENSURE(allowed.dim() == 2, kOp, ": allowed must have the shape [T, E] (got ", allowed.dim(), " dimensions)");
  EDL_ENSURE(allowed.scalar_type() == at::kBool, kOp, ": allowed must be bool (got ", allowed.scalar_type(), ")");
  EDL_ENSURE(
      allowed.device() == logits.device(), kOp, ": allowed must be on the device of logits (got ", allowed.device(),
      " and ", logits.device(), ")");
  EDL_ENSURE(
      allowed.sym_size(0).sym_eq(logits.sym_size(0)) & allowed.sym_size(1).sym_eq(logits.sym_size(1)), kOp,
      ": allowed must have the shape of logits (got ", allowed.sym_size(0), " by ", allowed.sym_size(1), " for ",
      logits.sym_size(0), " by ", logits.sym_size(1), ")");
}

void check_given(const at::Tensor& experts, const at::Tensor& logits, int64_t top_k) {
  EDL_ENSURE(experts.dim() == 2, kOp, ": experts must have the shape [T, K] (got ", experts.dim(), " dimensions)");
  EDL_ENSURE(
      is_index_type(experts.scalar_type()), kOp, ": experts must be int32 or int64 (got ", experts.scalar_type(), ")");
  EDL_ENSURE(
      experts.device() == logits.device(), kOp, ": experts must be on the device of logits (got ", experts.device(),
      " and ", logits.device(), ")");
  EDL_ENSURE(
      experts.sym_size(0).sym_eq(logits.sym_size(0)), kOp, ": experts must have one row per token (got ",
      experts.sym_size(0), " for ", logits.sym_size(0), " tokens)");
  EDL_ENSURE(
      experts.sym_size(1).sym_eq(top_k), kOp, ": experts must have top_k columns (got ", experts.sym_size(1),
      " and top_k ", top_k, ")");
}

} // namespace

Scores check_route_tokens(
    const at::Tensor& logits,
    int64_t top_k,
    std::string_view scores,
    const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& allowed,
    const std::optional<at::Tensor>& experts) {
  const Scores parsed = check_logits(logits, scores);
  EDL_ENSURE(top_k >= 1, kOp, ": top_k must be at least 1 (got ", top_k, ")");
  EDL_ENSURE(
      logits.sym_size(1).sym_ge(top_k), kOp, ": top_k must not exceed the number of experts (got ", top_k, " of ",
      logits.sym_size(1), ")");
  if (bias.has_value()) {
    check_bias(*bias, logits);
  }
  if (allowed.has_value()) {
    check_allowed(*allowed, logits);
  }
  if (experts.has_value()) {
    check_given(*experts, logits, top_k);
  }
  return parsed;
}

Scores check_route_tokens_backward(
    const at::Tensor& grad_weights,
    const at::Tensor& logits,
    const at::Tensor& experts,
    std::string_view scores,
    const std::optional<at::Tensor>& allowed,
    bool given) {
  const Scores parsed = check_logits(logits, scores);
  EDL_ENSURE(
      experts.dim() == 2 && (given ? is_index_type(experts.scalar_type()) : experts.scalar_type() == at::kLong), kOp,
      ": experts must be an int64 matrix, or one of the type that was given (got ", experts.dim(), " dimensions of ",
      experts.scalar_type(), ")");
  EDL_ENSURE(
      experts.sym_size(0).sym_eq(logits.sym_size(0)), kOp, ": experts must have one row per token (got ",
      experts.sym_size(0), " for ", logits.sym_size(0), " tokens)");
  EDL_ENSURE(
      grad_weights.dim() == 2 && grad_weights.scalar_type() == accumulation_type(logits.scalar_type()), kOp,
      ": the gradient of weights must be a matrix of the accumulation type (got ", grad_weights.dim(),
      " dimensions of ", grad_weights.scalar_type(), ")");
  EDL_ENSURE(
      grad_weights.sym_size(0).sym_eq(experts.sym_size(0)) & grad_weights.sym_size(1).sym_eq(experts.sym_size(1)), kOp,
      ": the gradient of weights must have the shape of experts (got ", grad_weights.sym_size(0), " by ",
      grad_weights.sym_size(1), ")");
  if (allowed.has_value()) {
    check_allowed(*allowed, logits);
  }
  return parsed;
}

std::tuple<at::Tensor, at::Tensor> route_tokens(
    const at::Tensor& logits,
    int64_t top_k,
    std::string_view scores,
    const std::optional<at::Tensor>& bias,
    bool normalize,
    double scale,
    const std::optional<at::Tensor>& allowed,
    const std::optional<at::Tensor>& experts) {
  static const auto op = find_operator<decltype(route_tokens)>("edl::route_tokens");
  return op.call(logits, top_k, scores, bias, normalize, scale, allowed, experts);
}

namespace {

at::Tensor route_tokens_backward(
    const at::Tensor& grad_weights,
    const at::Tensor& logits,
    const at::Tensor& experts,
    std::string_view scores,
    bool normalize,
    double scale,
    const std::optional<at::Tensor>& allowed,
    bool given) {
  static const auto op = find_operator<decltype(route_tokens_backward)>("edl::_route_tokens_backward");
  return op.call(grad_weights, logits, experts, scores, normalize, scale, allowed, given);
}

std::tuple<at::Tensor, at::Tensor> route_tokens_meta(
    const at::Tensor& logits,
    int64_t top_k,
    std::string_view scores,
    const std::optional<at::Tensor>& bias,
    bool /*normalize*/,
    double /*scale*/,
    const std::optional<at::Tensor>& allowed,
    const std::optional<at::Tensor>& experts) {
  check_route_tokens(logits, top_k, scores, bias, allowed, experts);
  const auto sizes = {logits.sym_size(0), c10::SymInt(top_k)};
  const auto options = logits.options().dtype(accumulation_type(logits.scalar_type()));
  return {at::empty_symint(sizes, options), at::empty_symint(sizes, logits.options().dtype(at::kLong))};
}

at::Tensor route_tokens_backward_meta(
    const at::Tensor& grad_weights,
    const at::Tensor& logits,
    const at::Tensor& experts,
    std::string_view scores,
    bool /*normalize*/,
    double /*scale*/,
    const std::optional<at::Tensor>& allowed,
    bool given) {
  check_route_tokens_backward(grad_weights, logits, experts, scores, allowed, given);
  return at::empty_symint(logits.sym_sizes(), logits.options());
}

struct RouteTokensFunction : torch::autograd::Function<RouteTokensFunction> {
  static constexpr bool is_traceable = true;

  static torch::autograd::variable_list forward(
      torch::autograd::AutogradContext* context,
      const at::Tensor& logits,
      int64_t top_k,
      std::string_view scores,
      const std::optional<at::Tensor>& bias,
      bool normalize,
      double scale,
      const std::optional<at::Tensor>& allowed,
      const std::optional<at::Tensor>& given) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [weights, experts] = route_tokens(logits, top_k, scores, bias, normalize, scale, allowed, given);
    context->save_for_backward({logits, given.value_or(experts), allowed.value_or(at::Tensor())});
    context->saved_data["given"] = given.has_value();
    context->saved_data["scores"] = std::string(scores);
    context->saved_data["normalize"] = normalize;
    context->saved_data["scale"] = scale;
    return {weights, experts};
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* context, const torch::autograd::variable_list& grads) {
    const auto saved = context->get_saved_variables();
    at::Tensor grad_logits;
    if (grads[0].defined() && context->needs_input_grad(0)) {
      grad_logits = route_tokens_backward(
          grads[0], saved[0], saved[1], context->saved_data["scores"].toStringRef(),
          context->saved_data["normalize"].toBool(), context->saved_data["scale"].toDouble(),
          saved[2].defined() ? std::optional(saved[2]) : std::nullopt, context->saved_data["given"].toBool());
    }
    return {grad_logits, {}, {}, {}, {}, {}, {}, {}};
  }
};

std::tuple<at::Tensor, at::Tensor> route_tokens_autograd(
    const at::Tensor& logits,
    int64_t top_k,
    std::string_view scores,
    const std::optional<at::Tensor>& bias,
    bool normalize,
    double scale,
    const std::optional<at::Tensor>& allowed,
    const std::optional<at::Tensor>& experts) {
  auto outputs = RouteTokensFunction::apply(logits, top_k, scores, bias, normalize, scale, allowed, experts);
  return {outputs[0], outputs[1]};
}

} // namespace
} // namespace edl

TORCH_LIBRARY_FRAGMENT(edl, m) {
  m.def(
      "route_tokens(Tensor logits, int top_k, str scores, Tensor? bias=None, bool normalize=True, float scale=1.0, "
      "Tensor? allowed=None, Tensor? experts=None) -> (Tensor weights, Tensor experts)");
  m.def(
      "_route_tokens_backward(Tensor grad_weights, Tensor logits, Tensor experts, str scores, bool normalize, "
      "float scale, Tensor? allowed=None, bool given=False) -> Tensor");
}

TORCH_LIBRARY_IMPL(edl, Meta, m) {
  m.impl("route_tokens", edl::route_tokens_meta);
  m.impl("_route_tokens_backward", edl::route_tokens_backward_meta);
}

TORCH_LIBRARY_IMPL(edl, Autograd, m) {
  m.impl("route_tokens", edl::route_tokens_autograd);
  m.impl("_route_tokens_backward", torch::autograd::autogradNotImplementedFallback());
}
