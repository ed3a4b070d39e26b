// token → loss as one step of autograd. The gradient of the loss to the segment sums is known with the loss, so backward
// only scales it and spreads it over the tokens. Where ranks or micro-batches hold parts of the batch, segment sums are
// a step of their own, for theirs to be added. Small batches are bound by the number of operators.
#include "edl/expert_divergence_loss.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>

#include "common/errors.h"
#include "common/operators.h"
#include "ops/aggregate_routing.h"
#include "ops/domain_moments.h"
#include "ops/expert_divergence.h"

namespace edl {
namespace {

constexpr const char* kOp = "edl::expert_divergence_loss";

struct Options {
  double eps;
  std::string_view scores;
  bool by_token; // the segments are the domains
  std::string_view pair_reduction;
  std::string_view layer_reduction; // mean, sum, none
  bool bias_correction;
};

struct SegmentSums {
  at::Tensor sums; //   [L, S, E], or [S, E] of one layer
  at::Tensor counts; // [S]
};

struct Moments {
  at::Tensor sums; //                    [..., D, E]
  at::Tensor counts; //                  [..., D]
  std::optional<at::Tensor> squares; // [..., D, E], for the bias correction
};

struct LossAndGradient {
  at::Tensor loss; //          scalar, or [L] with layer_reduction = none; in the type of the segment sums
  at::Tensor grad_segments; // [..., S, E]; undefined unless asked for
};

bool is_by_token(std::string_view sequence_reduction) {
  EDL_ENSURE(
      sequence_reduction == "token" || sequence_reduction == "sequence", kOp,
      ": sequence_reduction must be 'sequence' or 'token' (got '", sequence_reduction, "')");
  return sequence_reduction == "token";
}

Options parse_options(
    double eps,
    std::string_view scores,
    std::string_view sequence_reduction,
    std::string_view pair_reduction,
    std::string_view layer_reduction,
    bool bias_correction) {
  const bool by_token = is_by_token(sequence_reduction);
  EDL_ENSURE(
      layer_reduction == "mean" || layer_reduction == "sum" || layer_reduction == "none", kOp,
      ": layer_reduction must be 'mean', 'sum' or 'none' (got '", layer_reduction, "')");
  check_eps(kOp, eps);
  const PairReduction pairs = parse_pair_reduction(kOp, "pair_reduction", pair_reduction);
  EDL_ENSURE(
      !bias_correction || (!by_token && pairs == PairReduction::mean_of_logs), kOp,
      ": bias_correction needs sequence_reduction = 'sequence' and pair_reduction = 'mean_of_logs' (got '",
      sequence_reduction, "' and '", pair_reduction, "')");
  return {eps, scores, by_token, pair_reduction, layer_reduction, bias_correction};
}

void check_layers(std::string_view op, at::TensorList layers) {
  EDL_ENSURE(!layers.empty(), op, ": layers must hold at least one tensor (got an empty list)");
  for (const at::Tensor& routing : layers) {
    EDL_ENSURE(
        routing.dim() == 2 || routing.dim() == 3, op, ": layers must have the shape [T, E] or [B, S_len, E] (got ",
        routing.dim(), " dimensions)");
  }
}

void check_domains(const at::Tensor& labels, const c10::SymInt& num_domains, bool bias_correction) {
  EDL_ENSURE(
      num_domains.sym_ge(2), kOp, ": num_domains must be at least 2, or there is no pair to push apart (got ",
      num_domains, ")");
  EDL_ENSURE(
      !bias_correction || labels.dim() == 1, kOp, ": bias_correction needs one label per segment (got labels of ",
      labels.dim(), " dimensions)");
}

// [T, E] from [T, E] or [B, S_len, E].
at::Tensor as_rows(const at::Tensor& routing) {
  return routing.dim() == 3 ? routing.flatten(0, 1) : routing;
}

std::vector<at::Tensor> all_as_rows(at::TensorList layers) {
  std::vector<at::Tensor> rows;
  for (const at::Tensor& routing : layers) {
    rows.push_back(as_rows(routing));
  }
  return rows;
}

// to() is not called where there is nothing to convert: below autograd no operator may return its input.
at::Tensor in_type(const at::Tensor& x, at::ScalarType type) {
  return x.scalar_type() == type ? x : x.to(type);
}

SegmentSums sum_segments(
    at::TensorList layers,
    const at::Tensor& segment_ids,
    const c10::SymInt& num_segments,
    std::string_view scores,
    std::string_view op) {
  const std::vector<at::Tensor> rows = all_as_rows(layers);
  auto [sums, counts] = rows.size() == 1 ? aggregate_routing_for(rows[0], segment_ids, num_segments, scores, op)
                                         : aggregate_layers(rows, segment_ids, num_segments, scores, op);
  return {sums, counts};
}

Moments moments_of(
    const SegmentSums& segments, const at::Tensor& labels, c10::SymInt num_domains, bool by_token, bool squares) {
  if (by_token) {
    EDL_ENSURE(
        segments.counts.sym_size(0) == num_domains, kOp,
        ": with sequence_reduction = 'token' the segments are the domains (got ", segments.counts.sym_size(0),
        " segments and num_domains = ", num_domains, ")");
    const at::Tensor sums = in_type(segments.sums, at::kDouble);
    const auto shape = sums.sym_sizes();
    return {sums, in_type(segments.counts, at::kDouble).expand_symint(shape.slice(0, shape.size() - 1)), std::nullopt};
  }
  auto [sums, squared, counts] =
      domain_moments_for(segments.sums, segments.counts, labels, std::move(num_domains), squares, kOp);
  return {sums, counts, squares ? std::make_optional(squared) : std::nullopt};
}

// The loss of `moments`, and what these segments, a part of them, have of its gradient.
LossAndGradient loss_of(
    const Moments& moments,
    const SegmentSums& segments,
    const at::Tensor& labels,
    const Options& options,
    bool with_gradient) {
  LossAndGradient result;
  if (with_gradient) {
    auto [loss, grad_sums, grad_squares] = expert_divergence_with_gradient(
        moments.sums, moments.counts, options.eps, options.pair_reduction, moments.squares, kOp);
    result.loss = loss;
    result.grad_segments = options.by_token
        ? in_type(grad_sums, segments.sums.scalar_type())
        : domain_moments_backward(grad_sums, grad_squares, segments.sums, segments.counts, labels, kOp);
  } else {
    result.loss =
        expert_divergence_for(moments.sums, moments.counts, options.eps, options.pair_reduction, moments.squares, kOp);
  }
  result.loss = in_type(result.loss, segments.sums.scalar_type());
  if (result.loss.dim() == 0) { // of one layer
    result.loss = options.layer_reduction == "none" ? result.loss.unsqueeze(0) : result.loss;
  } else if (options.layer_reduction == "sum") {
    result.loss = result.loss.sum();
  } else if (options.layer_reduction == "mean") {
    if (with_gradient) {
      result.grad_segments.div_(static_cast<double>(result.loss.size(0)));
    }
    result.loss = result.loss.mean();
  }
  return result;
}

// What is saved for the layers' gradients: ids and layers, behind what else the caller saves.
void save_layers(
    torch::autograd::AutogradContext* context,
    torch::autograd::variable_list saved,
    at::TensorList layers,
    const at::Tensor& segment_ids,
    std::string_view scores) {
  saved.push_back(segment_ids);
  saved.insert(saved.end(), layers.begin(), layers.end());
  context->save_for_backward(std::move(saved));
  context->saved_data["scores"] = std::string(scores);
}

// The gradients of the layers, an operator's first inputs, of that of their segment sums, [L, S, E] or [S, E].
torch::autograd::variable_list gradients_of_layers(
    torch::autograd::AutogradContext* context,
    const torch::autograd::variable_list& saved,
    size_t num_others_saved,
    size_t num_inputs_behind_layers,
    const at::Tensor& grad_segments,
    std::string_view op) {
  const at::Tensor& segment_ids = saved[num_others_saved];
  const at::TensorList layers = at::TensorList(saved).slice(num_others_saved + 1);
  const auto& scores = context->saved_data["scores"].toStringRef();
  torch::autograd::variable_list gradients(layers.size() + num_inputs_behind_layers);
  bool all_are_needed = true;
  for (size_t l = 0; l < layers.size(); ++l) {
    all_are_needed = all_are_needed && context->needs_input_grad(l);
  }
  if (all_are_needed && layers.size() > 1) {
    const auto of_layers = aggregate_layers_backward(grad_segments, all_as_rows(layers), segment_ids, scores, op);
    for (size_t l = 0; l < layers.size(); ++l) {
      gradients[l] = of_layers[l].view_symint(layers[l].sym_sizes());
    }
    return gradients;
  }
  for (size_t l = 0; l < layers.size(); ++l) {
    if (context->needs_input_grad(l)) {
      gradients[l] = aggregate_routing_backward(
                         grad_segments.dim() == 2 ? grad_segments : grad_segments.select(0, static_cast<int64_t>(l)),
                         as_rows(layers[l]), segment_ids, scores, op)
                         .view_symint(layers[l].sym_sizes());
    }
  }
  return gradients;
}

// The loss of a batch, which knows its gradient to the segment sums once it is computed.
struct ExpertDivergenceLossFunction : torch::autograd::Function<ExpertDivergenceLossFunction> {
  static constexpr bool is_traceable = true;

  // `make` returns the loss and the gradient; it runs below autograd.
  template <typename Make>
  static at::Tensor forward(
      torch::autograd::AutogradContext* context,
      at::TensorList layers,
      const at::Tensor& segment_ids,
      std::string_view scores,
      Make make) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [loss, grad_segments] = make();
    save_layers(context, {grad_segments}, layers, segment_ids, scores);
    return loss;
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* context, const torch::autograd::variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const bool per_layer = grads[0].dim() == 1 && saved[0].dim() == 3;
    const at::Tensor grad_segments = at::mul(saved[0], per_layer ? grads[0].unsqueeze(-1).unsqueeze(-1) : grads[0]);
    return gradients_of_layers(
        context, saved, /*num_others_saved=*/1, /*num_inputs_behind_layers=*/3, grad_segments, kOp);
  }
};

// Segment sums [L, S, E] of all layers, one node for all. Compiled autograd takes no outputs that are marked as without
// gradient: the counts go around it.
struct SegmentSumsFunction : torch::autograd::Function<SegmentSumsFunction> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(
      torch::autograd::AutogradContext* context,
      at::TensorList layers,
      const at::Tensor& segment_ids,
      const c10::SymInt& num_segments,
      std::string_view scores,
      std::string_view op,
      at::Tensor* counts) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const SegmentSums segments = sum_segments(layers, segment_ids, num_segments, scores, op);
    save_layers(context, {}, layers, segment_ids, scores);
    context->saved_data["op"] = std::string(op);
    *counts = segments.counts;
    return layers.size() == 1 ? segments.sums.unsqueeze(0) : segments.sums;
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* context, const torch::autograd::variable_list& grads) {
    return gradients_of_layers(
        context, context->get_saved_variables(), /*num_others_saved=*/0, /*num_inputs_behind_layers=*/5, grads[0],
        context->saved_data["op"].toStringRef());
  }
};

at::Tensor loss_of_operators(
    at::TensorList layers,
    const at::Tensor& segment_ids,
    c10::SymInt num_segments,
    const at::Tensor& labels,
    c10::SymInt num_domains,
    double eps,
    std::string_view scores,
    std::string_view sequence_reduction,
    std::string_view pair_reduction,
    std::string_view layer_reduction,
    bool bias_correction) {
  const Options options =
      parse_options(eps, scores, sequence_reduction, pair_reduction, layer_reduction, bias_correction);
  check_layers(kOp, layers);
  check_domains(labels, num_domains, bias_correction);
  check_without_gradient(kOp, "labels", labels);
  const auto make = [&](bool with_gradient) {
    const SegmentSums segments = sum_segments(layers, segment_ids, num_segments, scores, kOp);
    const Moments moments = moments_of(segments, labels, num_domains, options.by_token, options.bias_correction);
    return loss_of(moments, segments, labels, options, with_gradient);
  };
  if (needs_gradient(layers)) {
    return ExpertDivergenceLossFunction::apply(
        layers, segment_ids, scores, [&make] { return make(/*with_gradient=*/true); });
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return make(/*with_gradient=*/false).loss;
}

// Segment sums [L, S, E] and counts [S] of all layers: for others' to be added to them.
std::tuple<at::Tensor, at::Tensor> segment_sums(
    at::TensorList layers,
    const at::Tensor& segment_ids,
    c10::SymInt num_segments,
    std::string_view scores,
    std::string_view op) {
  check_layers(op, layers);
  at::Tensor counts;
  if (needs_gradient(layers)) {
    at::Tensor sums = SegmentSumsFunction::apply(layers, segment_ids, num_segments, scores, op, &counts);
    return {sums, counts};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  SegmentSums segments = sum_segments(layers, segment_ids, num_segments, scores, op);
  return {layers.size() == 1 ? segments.sums.unsqueeze(0) : segments.sums, segments.counts};
}

} // namespace

at::Tensor expert_divergence_loss(
    at::TensorList layers,
    const at::Tensor& segment_ids,
    c10::SymInt num_segments,
    const at::Tensor& labels,
    c10::SymInt num_domains,
    double eps,
    std::string_view scores,
    std::string_view sequence_reduction,
    std::string_view pair_reduction,
    std::string_view layer_reduction,
    bool bias_correction) {
  static const auto op = find_operator<decltype(expert_divergence_loss)>("edl::expert_divergence_loss");
  return op.call(
      layers, segment_ids, std::move(num_segments), labels, std::move(num_domains), eps, scores, sequence_reduction,
      pair_reduction, layer_reduction, bias_correction);
}

} // namespace edl

TORCH_LIBRARY_FRAGMENT(edl, m) {
  m.def(
      "expert_divergence_loss(Tensor[] layers, Tensor segment_ids, SymInt num_segments, Tensor labels, "
      "SymInt num_domains, float eps=1e-6, str scores='softmax', str sequence_reduction='sequence', "
      "str pair_reduction='mean_of_logs', str layer_reduction='mean', bool bias_correction=False) -> Tensor");
  // Private: what aggregate_routing gives layer by layer, in one node. Only objectives call it, which TorchScript does
  // not take, so that no file has its name.
  m.def(
      "_segment_sums(Tensor[] layers, Tensor segment_ids, SymInt num_segments, str scores, str caller) -> (Tensor "
      "sums, Tensor counts)");
}

// Made of operators: no kernel of its own on any device.
TORCH_LIBRARY_IMPL(edl, CompositeImplicitAutograd, m) {
  m.impl("expert_divergence_loss", edl::loss_of_operators);
  m.impl("_segment_sums", edl::segment_sums);
}

// torch.vmap takes them apart too.
TORCH_LIBRARY_IMPL(edl, FuncTorchBatchedDecomposition, m) {
  m.impl("expert_divergence_loss", edl::loss_of_operators);
  m.impl("_segment_sums", edl::segment_sums);
}
