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

} // namespace

Scores check_route_tokens(
    const at::Tensor& logits, int64_t top_k, std::string_view scores, const std::optional<at::Tensor>& bias) {
  const Scores parsed = check_logits(logits, scores);
  EDL_ENSURE(top_k >= 1, kOp, ": top_k must be at least 1 (got ", top_k, ")");
  EDL_ENSURE(
      logits.sym_size(1).sym_ge(top_k), kOp, ": top_k must not exceed the number of experts (got ", top_k, " of ",
      logits.sym_size(1), ")");
  if (bias.has_value()) {
    check_bias(*bias, logits);
  }
  return parsed;
}

Scores check_route_tokens_backward(
    const at::Tensor& grad_weights, const at::Tensor& logits, const at::Tensor& experts, std::string_view scores) {
  const Scores parsed = check_logits(logits, scores);
  EDL_ENSURE(
      experts.dim() == 2 && experts.scalar_type() == at::kLong, kOp, ": experts must be an int64 matrix (got ",
      experts.dim(), " dimensions of ", experts.scalar_type(), ")");
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
  return parsed;
}

std::tuple<at::Tensor, at::Tensor> route_tokens(
    const at::Tensor& logits,
    int64_t top_k,
    std::string_view scores,
    const std::optional<at::Tensor>& bias,
    bool normalize,
    double scale) {
  static const auto op = find_operator<decltype(route_tokens)>("edl::route_tokens");
  return op.call(logits, top_k, scores, bias, normalize, scale);
}

namespace {

at::Tensor route_tokens_backward(
    const at::Tensor& grad_weights,
    const at::Tensor& logits,
    const at::Tensor& experts,
    std::string_view scores,
    bool normalize,
    double scale) {
  static const auto op = find_operator<decltype(route_tokens_backward)>("edl::_route_tokens_backward");
  return op.call(grad_weights, logits, experts, scores, normalize, scale);
}

std::tuple<at::Tensor, at::Tensor> route_tokens_meta(
    const at::Tensor& logits,
    int64_t top_k,
    std::string_view scores,
    const std::optional<at::Tensor>& bias,
    bool /*normalize*/,
    double /*scale*/) {
  check_route_tokens(logits, top_k, scores, bias);
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
    double /*scale*/) {
  check_route_tokens_backward(grad_weights, logits, experts, scores);
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
      double scale) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [weights, experts] = route_tokens(logits, top_k, scores, bias, normalize, scale);
    context->save_for_backward({logits, experts});
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
          context->saved_data["normalize"].toBool(), context->saved_data["scale"].toDouble());
    }
    return {grad_logits, {}, {}, {}, {}, {}};
  }
};

std::tuple<at::Tensor, at::Tensor> route_tokens_autograd(
    const at::Tensor& logits,
    int64_t top_k,
    std::string_view scores,
    const std::optional<at::Tensor>& bias,
    bool normalize,
    double scale) {
  auto outputs = RouteTokensFunction::apply(logits, top_k, scores, bias, normalize, scale);
  return {outputs[0], outputs[1]};
}

} // namespace
} // namespace edl

TORCH_LIBRARY_FRAGMENT(edl, m) {
  m.def(
      "route_tokens(Tensor logits, int top_k, str scores, Tensor? bias=None, bool normalize=True, float scale=1.0) "
      "-> (Tensor weights, Tensor experts)");
  m.def(
      "_route_tokens_backward(Tensor grad_weights, Tensor logits, Tensor experts, str scores, bool normalize, "
      "float scale) -> Tensor");
}

TORCH_LIBRARY_IMPL(edl, Meta, m) {
  m.impl("route_tokens", edl::route_tokens_meta);
  m.impl("_route_tokens_backward", edl::route_tokens_backward_meta);
}

TORCH_LIBRARY_IMPL(edl, Autograd, m) {
  m.impl("route_tokens", edl::route_tokens_autograd);
  m.impl("_route_tokens_backward", torch::autograd::autogradNotImplementedFallback());
}
