// token → loss in one step of autograd, where neither ranks nor micro-batches add their part in between: the gradient to
// the segment sums is then known with the loss. Small batches are bound by the number of operators, not by their work.
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/stack.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "common/errors.h"
#include "ops/aggregate_routing.h"
#include "ops/domain_moments.h"
#include "ops/expert_divergence.h"

namespace edl {
namespace {

constexpr const char* kOp = "edl::expert_divergence_loss";

struct Segments {
  const at::Tensor& ids; //    [T]
  c10::SymInt count; //        S
  const at::Tensor& labels; // [S] or [S, D]
  c10::SymInt num_domains; //  D
  bool are_domains; //         S = D: every token weighs the same
};

struct Options {
  std::string_view scores;
  double eps;
  std::string_view pair_reduction;
  bool bias_correction;
  std::string_view layer_reduction; // mean, sum, none
};

struct LossAndGradient {
  at::Tensor loss; //          scalar, or [L] with layer_reduction = none; in the type of the segment sums
  at::Tensor grad_segments; // [S, E] of one layer, else [L, S, E]; undefined unless asked for
};

// Below autograd an operator must not return its input, as to() does where there is nothing to convert.
at::Tensor in_type(const at::Tensor& x, at::ScalarType type) {
  return x.scalar_type() == type ? x : x.to(type);
}

// Below autograd.
LossAndGradient loss_of(at::TensorList layers, const Segments& segments, const Options& options, bool with_gradient) {
  std::vector<at::Tensor> layer_sums;
  at::Tensor counts;
  for (const at::Tensor& routing : layers) {
    auto [sums, layer_counts] = aggregate_routing(routing, segments.ids, segments.count, options.scores);
    layer_sums.push_back(sums);
    counts = layer_counts;
  }
  const at::Tensor sums = layers.size() == 1 ? layer_sums[0] : at::stack(layer_sums);
  at::Tensor domain_sums, squares, domain_counts;
  if (segments.are_domains) {
    domain_sums = in_type(sums, at::kDouble);
    squares = at::empty({0}, domain_sums.options());
    domain_counts = in_type(counts, at::kDouble).expand_symint(sums.sym_sizes().slice(0, sums.dim() - 1));
  } else {
    std::tie(domain_sums, squares, domain_counts) =
        domain_moments(sums, counts, segments.labels, segments.num_domains, options.bias_correction);
  }
  LossAndGradient result;
  if (with_gradient) {
    auto [loss, grad_sums, grad_squares] = expert_divergence_with_gradient(
        domain_sums, squares, domain_counts, options.eps, options.pair_reduction, options.bias_correction);
    result.loss = loss;
    result.grad_segments = segments.are_domains
        ? in_type(grad_sums, sums.scalar_type())
        : domain_moments_backward(grad_sums, grad_squares, sums, counts, segments.labels);
  } else {
    result.loss = expert_divergence(
        domain_sums, squares, domain_counts, options.eps, options.pair_reduction, options.bias_correction);
  }
  result.loss = in_type(result.loss, sums.scalar_type());
  if (layers.size() == 1) {
    result.loss = options.layer_reduction == "none" ? result.loss.unsqueeze(0) : result.loss;
  } else if (options.layer_reduction == "sum") {
    result.loss = result.loss.sum();
  } else if (options.layer_reduction == "mean") {
    result.loss = result.loss.mean();
    if (with_gradient) {
      result.grad_segments.div_(static_cast<double>(layers.size()));
    }
  }
  return result;
}

struct ExpertDivergenceLossFunction : torch::autograd::Function<ExpertDivergenceLossFunction> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(
      torch::autograd::AutogradContext* context,
      at::TensorList layers,
      const Segments& segments,
      const Options& options) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [loss, grad_segments] = loss_of(layers, segments, options, /*with_gradient=*/true);
    torch::autograd::variable_list saved = {grad_segments, segments.ids};
    saved.insert(saved.end(), layers.begin(), layers.end());
    context->save_for_backward(std::move(saved));
    context->saved_data["scores"] = std::string(options.scores);
    return loss;
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* context, const torch::autograd::variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const size_t num_layers = saved.size() - 2;
    const auto& scores = context->saved_data["scores"].toStringRef();
    const at::Tensor& grad_loss = grads[0];
    torch::autograd::variable_list gradients(num_layers + 2);
    const bool joint = grad_loss.dim() == 0;
    const at::Tensor grad_segments =
        at::mul(saved[0], joint || num_layers == 1 ? grad_loss : grad_loss.unsqueeze(-1).unsqueeze(-1));
    for (size_t l = 0; l < num_layers; ++l) {
      if (context->needs_input_grad(l)) {
        gradients[l] = aggregate_routing_backward(
            num_layers == 1 ? grad_segments : grad_segments.select(0, static_cast<int64_t>(l)), saved[l + 2], saved[1],
            scores);
      }
    }
    return gradients;
  }
};

bool needs_autograd(at::TensorList layers) {
  for (const at::Tensor& routing : layers) {
    // A tangent of forward-mode differentiation goes to the autograd function, which refuses it.
    if ((at::GradMode::is_enabled() && routing.requires_grad()) || routing._fw_grad(/*level=*/0).defined()) {
      return true;
    }
  }
  return false;
}

at::Tensor expert_divergence_loss(
    at::TensorList layers, // L times [T, E]
    const at::Tensor& segment_ids,
    c10::SymInt num_segments,
    const at::Tensor& labels,
    c10::SymInt num_domains,
    std::string_view scores,
    std::string_view sequence_reduction,
    double eps,
    std::string_view pair_reduction,
    bool bias_correction,
    std::string_view layer_reduction) {
  const bool by_token = sequence_reduction == "token";
  EDL_CHECK(!layers.empty(), kOp, ": layers must hold at least one tensor (got an empty list)");
  EDL_CHECK(
      by_token || sequence_reduction == "sequence", kOp, ": sequence_reduction must be 'sequence' or 'token' (got '",
      sequence_reduction, "')");
  EDL_CHECK(
      layer_reduction == "mean" || layer_reduction == "sum" || layer_reduction == "none", kOp,
      ": layer_reduction must be 'mean', 'sum' or 'none' (got '", layer_reduction, "')");
  EDL_CHECK(
      !by_token || !bias_correction, kOp,
      ": bias_correction needs sequence_reduction = 'sequence' (got sequence_reduction = 'token')");
  EDL_CHECK(
      !by_token || num_segments == num_domains, kOp,
      ": with sequence_reduction = 'token' the segments are the domains (got num_segments = ", num_segments,
      " and num_domains = ", num_domains, ")");
  check_domain_moments_inputs_without_gradient(segment_ids, labels);
  const Segments segments = {segment_ids, std::move(num_segments), labels, std::move(num_domains), by_token};
  const Options options = {scores, eps, pair_reduction, bias_correction, layer_reduction};
  if (needs_autograd(layers)) {
    return ExpertDivergenceLossFunction::apply(layers, segments, options);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return loss_of(layers, segments, options, /*with_gradient=*/false).loss;
}

} // namespace
} // namespace edl

TORCH_LIBRARY_FRAGMENT(edl, m) {
  m.def(
      "_expert_divergence_loss(Tensor[] layers, Tensor segment_ids, SymInt num_segments, Tensor labels, "
      "SymInt num_domains, str scores, str sequence_reduction, float eps, str pair_reduction, bool bias_correction, "
      "str layer_reduction) -> Tensor");
}

// Made of operators: no kernel of its own on any device.
TORCH_LIBRARY_IMPL(edl, CompositeImplicitAutograd, m) {
  m.impl("_expert_divergence_loss", edl::expert_divergence_loss);
}
