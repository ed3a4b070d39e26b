// token → segment: sums[s, e] = sum over t with segment_ids[t] = s of score(routing[t])[e].
#include "ops/aggregate_routing.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/stack.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>

#include "common/dtypes.h"
#include "common/errors.h"
#include "common/operators.h"
#include "ops/tensor_checks.h"

namespace edl {
namespace {

constexpr const char* kOp = "edl::aggregate_routing";

void check_rows(std::string_view op, const at::Tensor& routing, const at::Tensor& segment_ids) {
  check_dimensions(op, routing, "routing", 2, "[T, E]");
  check_storage_type(op, routing, "routing");
  check_dimensions(op, segment_ids, "segment_ids", 1, "[T]");
  EDL_ENSURE(
      is_index_type(segment_ids.scalar_type()), op, ": segment_ids must be int32 or int64 (got ",
      segment_ids.scalar_type(), ")");
  check_device(op, segment_ids, "segment_ids", routing, "routing");
  EDL_ENSURE(
      segment_ids.sym_size(0).sym_eq(routing.sym_size(0)), op,
      ": segment_ids must have one entry per row of routing (got ", segment_ids.sym_size(0), " ids for ",
      routing.sym_size(0), " rows)");
}

} // namespace

Scores check_aggregate_routing(
    std::string_view op,
    const at::Tensor& routing,
    const at::Tensor& segment_ids,
    const c10::SymInt& num_segments,
    std::string_view scores) {
  check_rows(op, routing, segment_ids);
  EDL_ENSURE(
      routing.sym_size(1).sym_ge(1), op, ": routing must have at least one expert (got a tensor of ",
      routing.sym_size(0), " by ", routing.sym_size(1), ")");
  EDL_ENSURE(num_segments.sym_ge(0), op, ": num_segments must not be negative (got ", num_segments, ")");
  return parse_scores(op, scores);
}

Scores check_aggregate_routing_backward(
    std::string_view op,
    const at::Tensor& grad_sums,
    const at::Tensor& routing,
    const at::Tensor& segment_ids,
    std::string_view scores) {
  check_rows(op, routing, segment_ids);
  check_dimensions(op, grad_sums, "the gradient of sums", 2, "[S, E]");
  check_form(
      op, grad_sums, "the gradient of sums", accumulation_type(routing.scalar_type()),
      {grad_sums.sym_size(0), routing.sym_size(1)});
  return parse_scores(op, scores);
}

std::tuple<at::Tensor, at::Tensor> aggregate_routing_for(
    const at::Tensor& routing,
    const at::Tensor& segment_ids,
    c10::SymInt num_segments,
    std::string_view scores,
    std::string_view op) {
  static const auto registered = find_operator<decltype(aggregate_routing_for)>(kOp);
  return registered.call(routing, segment_ids, std::move(num_segments), scores, op);
}

std::tuple<at::Tensor, at::Tensor> aggregate_routing(
    const at::Tensor& routing, const at::Tensor& segment_ids, c10::SymInt num_segments, std::string_view scores) {
  return aggregate_routing_for(routing, segment_ids, std::move(num_segments), scores, kOp);
}

at::Tensor aggregate_routing_backward(
    const at::Tensor& grad_sums,
    const at::Tensor& routing,
    const at::Tensor& segment_ids,
    std::string_view scores,
    std::string_view op) {
  static const auto registered =
      find_operator<decltype(aggregate_routing_backward)>("edl::_aggregate_routing_backward");
  return registered.call(grad_sums, routing, segment_ids, scores, op);
}

void check_layers_alike(std::string_view op, at::TensorList layers) {
  EDL_ENSURE(!layers.empty(), op, ": layers must hold at least one tensor (got an empty list)");
  const at::Tensor& first = layers[0];
  for (const at::Tensor& layer : layers) {
    c10::SymBool alike =
        layer.dim() == first.dim() && layer.scalar_type() == first.scalar_type() && layer.device() == first.device();
    for (int64_t i = 0; i < std::min(layer.dim(), first.dim()); ++i) {
      alike = alike & layer.sym_size(i).sym_eq(first.sym_size(i));
    }
    EDL_ENSURE(
        alike, op, ": all layers must have one shape, type and device (got ", first.sym_sizes(), " ",
        first.scalar_type(), " on ", first.device(), " and ", layer.sym_sizes(), " ", layer.scalar_type(), " on ",
        layer.device(), ")");
  }
}

std::tuple<at::Tensor, at::Tensor> aggregate_layers(
    at::TensorList layers,
    const at::Tensor& segment_ids,
    c10::SymInt num_segments,
    std::string_view scores,
    std::string_view op) {
  static const auto registered = find_operator<decltype(aggregate_layers)>("edl::_aggregate_layers");
  return registered.call(layers, segment_ids, std::move(num_segments), scores, op);
}

std::vector<at::Tensor> aggregate_layers_backward(
    const at::Tensor& grad_sums,
    at::TensorList layers,
    const at::Tensor& segment_ids,
    std::string_view scores,
    std::string_view op) {
  static const auto registered = find_operator<decltype(aggregate_layers_backward)>("edl::_aggregate_layers_backward");
  return registered.call(grad_sums, layers, segment_ids, scores, op);
}

namespace {

// Where no kernel takes all layers at once.
std::tuple<at::Tensor, at::Tensor> aggregate_one_by_one(
    at::TensorList layers,
    const at::Tensor& segment_ids,
    c10::SymInt num_segments,
    std::string_view scores,
    std::string_view op) {
  check_layers_alike(op, layers);
  std::vector<at::Tensor> layer_sums;
  at::Tensor counts;
  for (const at::Tensor& routing : layers) {
    auto [sums, layer_counts] = aggregate_routing_for(routing, segment_ids, num_segments, scores, op);
    layer_sums.push_back(sums);
    counts = layer_counts;
  }
  return {at::stack(layer_sums), counts};
}

std::vector<at::Tensor> differentiate_one_by_one(
    const at::Tensor& grad_sums,
    at::TensorList layers,
    const at::Tensor& segment_ids,
    std::string_view scores,
    std::string_view op) {
  std::vector<at::Tensor> gradients;
  for (size_t l = 0; l < layers.size(); ++l) {
    const at::Tensor grad = grad_sums.select(0, static_cast<int64_t>(l));
    gradients.push_back(aggregate_routing_backward(grad, layers[l], segment_ids, scores, op));
  }
  return gradients;
}

std::tuple<at::Tensor, at::Tensor> aggregate_routing_meta(
    const at::Tensor& routing,
    const at::Tensor& segment_ids,
    c10::SymInt num_segments,
    std::string_view scores,
    std::string_view op) {
  check_aggregate_routing(op, routing, segment_ids, num_segments, scores);
  const auto options = routing.options().dtype(accumulation_type(routing.scalar_type()));
  return {at::empty_symint({num_segments, routing.sym_size(1)}, options), at::empty_symint({num_segments}, options)};
}

at::Tensor aggregate_routing_backward_meta(
    const at::Tensor& grad_sums,
    const at::Tensor& routing,
    const at::Tensor& segment_ids,
    std::string_view scores,
    std::string_view op) {
  check_aggregate_routing_backward(op, grad_sums, routing, segment_ids, scores);
  return at::empty_symint(routing.sym_sizes(), routing.options());
}

// Compiled autograd takes no outputs that are marked as without gradient: the counts go around it.
struct AggregateRoutingFunction : torch::autograd::Function<AggregateRoutingFunction> {
  static constexpr bool is_traceable = true;

  static torch::autograd::variable_list forward(
      torch::autograd::AutogradContext* context,
      const at::Tensor& routing,
      const at::Tensor& segment_ids,
      c10::SymInt num_segments,
      std::string_view scores,
      std::string_view op,
      at::Tensor* counts) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto outputs = aggregate_routing_for(routing, segment_ids, std::move(num_segments), scores, op);
    context->save_for_backward({routing, segment_ids});
    context->saved_data["scores"] = std::string(scores);
    context->saved_data["op"] = std::string(op);
    *counts = std::get<1>(outputs);
    return {std::get<0>(outputs)};
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* context, const torch::autograd::variable_list& grads) {
    const auto saved = context->get_saved_variables();
    at::Tensor grad_routing;
    if (grads[0].defined() && context->needs_input_grad(0)) {
      grad_routing = aggregate_routing_backward(
          grads[0], saved[0], saved[1], context->saved_data["scores"].toStringRef(),
          context->saved_data["op"].toStringRef());
    }
    return {grad_routing, {}, {}, {}, {}, {}};
  }
};

std::tuple<at::Tensor, at::Tensor> aggregate_routing_autograd(
    const at::Tensor& routing,
    const at::Tensor& segment_ids,
    c10::SymInt num_segments,
    std::string_view scores,
    std::string_view op) {
  at::Tensor counts;
  auto sums = AggregateRoutingFunction::apply(routing, segment_ids, std::move(num_segments), scores, op, &counts);
  return {sums[0], counts};
}

} // namespace
} // namespace edl

TORCH_LIBRARY_FRAGMENT(edl, m) {
  m.def(
      "aggregate_routing(Tensor routing, Tensor segment_ids, SymInt num_segments, str scores, *, "
      "str caller='edl::aggregate_routing') -> (Tensor sums, Tensor counts)");
  m.def(
      "_aggregate_routing_backward(Tensor grad_sums, Tensor routing, Tensor segment_ids, str scores, *, "
      "str caller='edl::aggregate_routing') -> Tensor");
  m.def(
      "_aggregate_layers(Tensor[] layers, Tensor segment_ids, SymInt num_segments, str scores, *, "
      "str caller='edl::aggregate_routing') -> (Tensor sums, Tensor counts)");
  m.def(
      "_aggregate_layers_backward(Tensor grad_sums, Tensor[] layers, Tensor segment_ids, str scores, *, "
      "str caller='edl::aggregate_routing') -> Tensor[]");
}

TORCH_LIBRARY_IMPL(edl, CompositeExplicitAutograd, m) {
  m.impl("_aggregate_layers", edl::aggregate_one_by_one);
  m.impl("_aggregate_layers_backward", edl::differentiate_one_by_one);
}

// torch.vmap takes no lists of tensors.
TORCH_LIBRARY_IMPL(edl, FuncTorchBatchedDecomposition, m) {
  m.impl("_aggregate_layers", edl::aggregate_one_by_one);
  m.impl("_aggregate_layers_backward", edl::differentiate_one_by_one);
}

TORCH_LIBRARY_IMPL(edl, Meta, m) {
  m.impl("aggregate_routing", edl::aggregate_routing_meta);
  m.impl("_aggregate_routing_backward", edl::aggregate_routing_backward_meta);
}

TORCH_LIBRARY_IMPL(edl, Autograd, m) {
  m.impl("aggregate_routing", edl::aggregate_routing_autograd);
  m.impl("_aggregate_routing_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("_aggregate_layers", torch::autograd::autogradNotImplementedFallback());
  m.impl("_aggregate_layers_backward", torch::autograd::autogradNotImplementedFallback());
}
