// domain → pairs: the Expert Divergence loss of domain moments. Its gradient matrices cost little beside the value, so
// they are computed with it and saved; backward only scales them.
#include "ops/expert_divergence.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <cmath>

#include "common/errors.h"
#include "common/operators.h"

namespace edl {
namespace {

constexpr const char* kOp = "edl::expert_divergence";

} // namespace

PairReduction parse_pair_reduction(std::string_view op, const char* argument, std::string_view reduction) {
  if (reduction == "mean_of_logs") {
    return PairReduction::mean_of_logs;
  }
  EDL_ENSURE(
      reduction == "log_of_mean", op, ": ", argument, " must be 'mean_of_logs' or 'log_of_mean' (got '", reduction,
      "')");
  return PairReduction::log_of_mean;
}

void check_eps(std::string_view op, double eps) {
  EDL_ENSURE(eps >= 0 && std::isfinite(eps), op, ": eps must be finite and not negative (got ", eps, ")");
}

void check_moments(
    std::string_view op, const at::Tensor& sums, const at::Tensor& counts, const std::optional<at::Tensor>& squares) {
  EDL_ENSURE(sums.dim() >= 2, op, ": sums must have the shape [..., D, E] (got ", sums.dim(), " dimensions)");
  EDL_ENSURE(
      sums.scalar_type() == at::kDouble && counts.scalar_type() == at::kDouble, op,
      ": sums and counts must be float64 (got ", sums.scalar_type(), " and ", counts.scalar_type(), ")");
  EDL_ENSURE(
      counts.dim() == sums.dim() - 1, op, ": counts must have the shape [..., D] of sums (got ", counts.dim(),
      " dimensions for ", sums.dim(), ")");
  for (int64_t i = 0; i < counts.dim(); ++i) {
    EDL_ENSURE(
        counts.sym_size(i).sym_eq(sums.sym_size(i)), op, ": counts must have one entry per domain of sums (got ",
        counts.sym_sizes(), " for ", sums.sym_sizes(), ")");
  }
  EDL_ENSURE(
      counts.device() == sums.device(), op, ": all tensors must be on one device (got ", sums.device(), " and ",
      counts.device(), ")");
  if (!squares.has_value()) {
    return;
  }
  EDL_ENSURE(
      squares->device() == sums.device(), op, ": all tensors must be on one device (got ", sums.device(), " and ",
      squares->device(), ")");
  EDL_ENSURE(squares->scalar_type() == at::kDouble, op, ": squares must be float64 (got ", squares->scalar_type(), ")");
  EDL_ENSURE(
      squares->dim() == sums.dim(), op, ": squares must have the shape of sums (got ", squares->sym_sizes(), " for ",
      sums.sym_sizes(), ")");
  for (int64_t i = 0; i < sums.dim(); ++i) {
    EDL_ENSURE(
        squares->sym_size(i).sym_eq(sums.sym_size(i)), op, ": squares must have the shape of sums (got ",
        squares->sym_sizes(), " for ", sums.sym_sizes(), ")");
  }
}

PairReduction check_expert_divergence(
    std::string_view op,
    const at::Tensor& sums,
    const at::Tensor& counts,
    double eps,
    std::string_view reduction,
    const std::optional<at::Tensor>& squares) {
  check_moments(op, sums, counts, squares);
  check_eps(op, eps);
  const PairReduction parsed = parse_pair_reduction(op, "reduction", reduction);
  EDL_ENSURE(
      !squares.has_value() || parsed == PairReduction::mean_of_logs, op,
      ": squares correct the bias of reduction = 'mean_of_logs' only (got '", reduction, "')");
  return parsed;
}

at::Tensor expert_divergence_for(
    const at::Tensor& sums,
    const at::Tensor& counts,
    double eps,
    std::string_view reduction,
    const std::optional<at::Tensor>& squares,
    std::string_view op) {
  static const auto registered = find_operator<decltype(expert_divergence_for)>(kOp);
  return registered.call(sums, counts, eps, reduction, squares, op);
}

at::Tensor expert_divergence(
    const at::Tensor& sums,
    const at::Tensor& counts,
    double eps,
    std::string_view reduction,
    const std::optional<at::Tensor>& squares) {
  return expert_divergence_for(sums, counts, eps, reduction, squares, kOp);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> expert_divergence_with_gradient(
    const at::Tensor& sums,
    const at::Tensor& counts,
    double eps,
    std::string_view reduction,
    const std::optional<at::Tensor>& squares,
    std::string_view op) {
  static const auto registered =
      find_operator<decltype(expert_divergence_with_gradient)>("edl::_expert_divergence_with_gradient");
  return registered.call(sums, counts, eps, reduction, squares, op);
}

namespace {

std::tuple<at::Tensor, at::Tensor> expert_divergence_backward(
    const at::Tensor& grad_loss,
    const at::Tensor& grad_sums,
    const at::Tensor& grad_squares,
    const at::Tensor& sums,
    const std::optional<at::Tensor>& squares) {
  static const auto op = find_operator<decltype(expert_divergence_backward)>("edl::_expert_divergence_backward");
  return op.call(grad_loss, grad_sums, grad_squares, sums, squares);
}

// The same on every device: the work was done in the forward pass. `sums` and `squares` are not read; they are
// arguments so that a second derivative finds its way to them and is refused, instead of taking the matrices for
// constants.
std::tuple<at::Tensor, at::Tensor> expert_divergence_backward_kernel(
    const at::Tensor& grad_loss, //    [...]
    const at::Tensor& grad_sums, //    [..., D, E]
    const at::Tensor& grad_squares, // [..., D, E] or 0 elements
    const at::Tensor& sums, //         [..., D, E]
    const std::optional<at::Tensor>& squares) {
  const at::Tensor scale = grad_loss.dim() == 0 ? grad_loss : grad_loss.unsqueeze(-1).unsqueeze(-1);
  return {
      at::mul(scale, grad_sums),
      grad_squares.dim() == grad_sums.dim() ? at::mul(scale, grad_squares) : at::empty({0}, grad_sums.options())};
}

at::Tensor expert_divergence_meta(
    const at::Tensor& sums,
    const at::Tensor& counts,
    double eps,
    std::string_view reduction,
    const std::optional<at::Tensor>& squares,
    std::string_view op) {
  check_expert_divergence(op, sums, counts, eps, reduction, squares);
  return at::empty_symint(sums.sym_sizes().slice(0, sums.dim() - 2), sums.options());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> expert_divergence_with_gradient_meta(
    const at::Tensor& sums,
    const at::Tensor& counts,
    double eps,
    std::string_view reduction,
    const std::optional<at::Tensor>& squares,
    std::string_view op) {
  return {
      expert_divergence_meta(sums, counts, eps, reduction, squares, op),
      at::empty_symint(sums.sym_sizes(), sums.options()),
      squares.has_value() ? at::empty_symint(sums.sym_sizes(), sums.options()) : at::empty_symint({0}, sums.options())};
}

struct ExpertDivergenceFunction : torch::autograd::Function<ExpertDivergenceFunction> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(
      torch::autograd::AutogradContext* context,
      const at::Tensor& sums,
      const at::Tensor& counts,
      double eps,
      std::string_view reduction,
      const std::optional<at::Tensor>& squares,
      std::string_view op) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [loss, grad_sums, grad_squares] = expert_divergence_with_gradient(sums, counts, eps, reduction, squares, op);
    torch::autograd::variable_list saved = {grad_sums, grad_squares, sums};
    if (squares.has_value()) {
      saved.push_back(*squares);
    }
    context->save_for_backward(std::move(saved));
    return loss;
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* context, const torch::autograd::variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const auto squares = saved.size() > 3 ? std::make_optional(saved[3]) : std::nullopt;
    auto [grad_sums, grad_squares] = expert_divergence_backward(grads[0], saved[0], saved[1], saved[2], squares);
    return {grad_sums, {}, {}, {}, squares.has_value() ? grad_squares : at::Tensor(), {}};
  }
};

at::Tensor expert_divergence_autograd(
    const at::Tensor& sums,
    const at::Tensor& counts,
    double eps,
    std::string_view reduction,
    const std::optional<at::Tensor>& squares,
    std::string_view op) {
  check_without_gradient(op, "counts", counts);
  if (!needs_gradient(sums) && !(squares.has_value() && needs_gradient(*squares))) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return expert_divergence_for(sums, counts, eps, reduction, squares, op);
  }
  return ExpertDivergenceFunction::apply(sums, counts, eps, reduction, squares, op);
}

} // namespace
} // namespace edl

TORCH_LIBRARY_FRAGMENT(edl, m) {
  m.def(
      "expert_divergence(Tensor sums, Tensor counts, float eps=1e-6, str reduction='mean_of_logs', Tensor? "
      "squares=None, *, str caller='edl::expert_divergence') -> Tensor");
  m.def(
      "_expert_divergence_with_gradient(Tensor sums, Tensor counts, float eps, str reduction, Tensor? squares, *, "
      "str caller='edl::expert_divergence') -> (Tensor loss, Tensor grad_sums, Tensor grad_squares)");
  m.def(
      "_expert_divergence_backward(Tensor grad_loss, Tensor grad_sums, Tensor grad_squares, Tensor sums, Tensor? "
      "squares) -> (Tensor grad_sums, Tensor grad_squares)");
}

TORCH_LIBRARY_IMPL(edl, CompositeExplicitAutograd, m) {
  m.impl("_expert_divergence_backward", edl::expert_divergence_backward_kernel);
}

TORCH_LIBRARY_IMPL(edl, Meta, m) {
  m.impl("expert_divergence", edl::expert_divergence_meta);
  m.impl("_expert_divergence_with_gradient", edl::expert_divergence_with_gradient_meta);
}

TORCH_LIBRARY_IMPL(edl, Autograd, m) {
  m.impl("expert_divergence", edl::expert_divergence_autograd);
  m.impl("_expert_divergence_with_gradient", torch::autograd::autogradNotImplementedFallback());
  m.impl("_expert_divergence_backward", torch::autograd::autogradNotImplementedFallback());
}
