// tokens → experts → tokens, without a dispatched copy of the tokens.
#include "ops/expert_mlp.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <limits>
#include <string>

#include "common/autocast.h"
#include "common/dtypes.h"
#include "common/errors.h"
#include "common/operators.h"
#include "common/tensors.h"
#include "ops/routing_checks.h"
#include "ops/tensor_checks.h"

namespace edl {
namespace {

constexpr const char* kOp = "edl::expert_mlp";
constexpr const char* kWithGram = "edl::expert_mlp_with_gram";
constexpr int64_t kMostSlots = std::numeric_limits<int32_t>::max();

void check_parameter(
    const char* op, const at::Tensor& parameter, const char* name, const char* shape, const at::Tensor& tokens) {
  check_dimensions(op, parameter, name, 3, shape);
  EDL_ENSURE(
      parameter.scalar_type() == tokens.scalar_type(), op, ": ", name, " must have the type of tokens (got ",
      parameter.scalar_type(), " beside ", tokens.scalar_type(), ")");
  check_device(op, parameter, name, tokens, "tokens");
}

void check_gradient_of_gram(
    const std::optional<at::Tensor>& grad, const at::Tensor& weights, const at::Tensor& tokens) {
  if (grad.has_value()) {
    check_form(
        kOp, *grad, "the gradient of a Gram matrix", accumulation_type(tokens.scalar_type()),
        {tokens.sym_size(0), weights.sym_size(1), weights.sym_size(1)});
  }
}

ProductsWait& products_wait() {
  static ProductsWait told = nullptr;
  return told;
}

} // namespace

void tell_whether_products_wait(ProductsWait told) {
  products_wait() = told;
}

const char* expert_mlp_name(bool with_gram) {
  return with_gram ? kWithGram : kOp;
}

void check_expert_mlp(
    const char* op,
    const at::Tensor& tokens,
    const at::Tensor& weights,
    const at::Tensor& row_order,
    const at::Tensor& offsets,
    const at::Tensor& gate_up,
    const at::Tensor& down) {
  check_dimensions(op, tokens, "tokens", 2, "[T, H]");
  check_storage_type(op, tokens, "tokens");
  check_routing_weights(op, weights, tokens, "tokens");
  check_sorted_indices(op, row_order, "row_order", tokens, "tokens");
  check_sorted_indices(op, offsets, "offsets", tokens, "tokens");
  check_parameter(op, gate_up, "gate_up", "[E, 2I, H]", tokens);
  check_parameter(op, down, "down", "[E, H, I]", tokens);
  EDL_ENSURE(
      weights.sym_size(0).sym_eq(tokens.sym_size(0)), op, ": weights must have one row per token (got ",
      weights.sym_size(0), " for ", tokens.sym_size(0), " tokens)");
  EDL_ENSURE(
      weights.sym_size(1).sym_ge(1), op, ": weights must have at least one column (got ", weights.sym_size(1), ")");
  EDL_ENSURE(
      row_order.sym_size(0).sym_eq(weights.sym_numel()), op, ": row_order must have one entry per weight (got ",
      row_order.sym_size(0), " for ", weights.sym_numel(), " weights)");
  // A symbolic size would turn this into a bound on the batch that users of torch.export had to state.
  if (const auto num_slots = weights.sym_numel().maybe_as_int()) {
    EDL_ENSURE(*num_slots <= kMostSlots, op, ": weights must have fewer than 2^31 entries (got ", *num_slots, ")");
  }
  EDL_ENSURE(
      gate_up.sym_size(0).sym_ge(1), op, ": gate_up must have at least one expert (got ", gate_up.sym_size(0), ")");
  EDL_ENSURE(
      offsets.sym_size(0).sym_eq(gate_up.sym_size(0) + 1), op,
      ": offsets must have one entry more than there are experts (got ", offsets.sym_size(0), " for ",
      gate_up.sym_size(0), " experts)");
  EDL_ENSURE(
      gate_up.sym_size(2).sym_eq(tokens.sym_size(1)), op, ": gate_up must have one column per entry of a token (got ",
      gate_up.sym_size(2), " for tokens of ", tokens.sym_size(1), ")");
  EDL_ENSURE(
      down.sym_size(0).sym_eq(gate_up.sym_size(0)), op, ": down must have as many experts as gate_up (got ",
      down.sym_size(0), " and ", gate_up.sym_size(0), ")");
  EDL_ENSURE(
      down.sym_size(1).sym_eq(tokens.sym_size(1)), op, ": down must have one row per entry of a token (got ",
      down.sym_size(1), " for tokens of ", tokens.sym_size(1), ")");
  EDL_ENSURE(
      gate_up.sym_size(1).sym_eq(down.sym_size(2) * 2), op,
      ": gate_up must have twice as many rows as down has columns (got ", gate_up.sym_size(1), " and ",
      down.sym_size(2), ")");
}

void check_expert_mlp_backward(
    const at::Tensor& grad_output,
    const std::optional<at::Tensor>& grad_output_gram,
    const std::optional<at::Tensor>& grad_activation_gram,
    const at::Tensor& tokens,
    const at::Tensor& weights,
    const at::Tensor& row_order,
    const at::Tensor& offsets,
    const at::Tensor& gate_up,
    const at::Tensor& down,
    const std::optional<at::Tensor>& pre_activation,
    const std::optional<at::Tensor>& rows) {
  check_expert_mlp(kOp, tokens, weights, row_order, offsets, gate_up, down);
  const auto type = tokens.scalar_type();
  check_form(kOp, grad_output, "the gradient of the output", type, tokens.sym_sizes());
  check_gradient_of_gram(grad_activation_gram, weights, tokens);
  check_gradient_of_gram(grad_output_gram, weights, tokens);
  if (!pre_activation.has_value()) {
    EDL_ENSURE(!rows.has_value(), kOp, ": rows must be given with pre_activation (got rows alone)");
    return;
  }
  check_form(kOp, *pre_activation, "pre_activation", type, {row_order.sym_size(0), gate_up.sym_size(1)});
  if (grad_output_gram.has_value()) {
    EDL_ENSURE(rows.has_value(), kOp, ": the gradient of output_gram needs rows (got none)");
    check_form(kOp, *rows, "rows", type, {row_order.sym_size(0), tokens.sym_size(1)});
  }
}

at::Tensor expert_mlp(
    const at::Tensor& tokens,
    const at::Tensor& weights,
    const at::Tensor& row_order,
    const at::Tensor& offsets,
    const at::Tensor& gate_up,
    const at::Tensor& down,
    bool recompute_activations) {
  static const auto op = find_operator<decltype(expert_mlp)>("edl::expert_mlp");
  return op.call(tokens, weights, row_order, offsets, gate_up, down, recompute_activations);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> expert_mlp_with_gram(
    const at::Tensor& tokens,
    const at::Tensor& weights,
    const at::Tensor& row_order,
    const at::Tensor& offsets,
    const at::Tensor& gate_up,
    const at::Tensor& down,
    bool output_gram,
    bool activation_gram,
    bool recompute_activations) {
  static const auto op = find_operator<decltype(expert_mlp_with_gram)>("edl::expert_mlp_with_gram");
  return op.call(
      tokens, weights, row_order, offsets, gate_up, down, output_gram, activation_gram, recompute_activations);
}

namespace {

using WithGram = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

bool waits(const at::Tensor& gate_up, const at::Tensor& down) {
  const ProductsWait told = products_wait();
  return gate_up.is_cuda() && (told == nullptr || told(gate_up, down));
}

ExpertMlpResults expert_mlp_forward(
    const at::Tensor& tokens,
    const at::Tensor& weights,
    const at::Tensor& row_order,
    const at::Tensor& offsets,
    const at::Tensor& gate_up,
    const at::Tensor& down,
    bool output_gram,
    bool activation_gram) {
  static const auto op = find_operator<decltype(expert_mlp_forward)>("edl::_expert_mlp_forward");
  static const auto waiting = find_operator<decltype(expert_mlp_forward)>("edl::_expert_mlp_forward", "waiting");
  return (waits(gate_up, down) ? waiting : op)
      .call(tokens, weights, row_order, offsets, gate_up, down, output_gram, activation_gram);
}

ExpertMlpGradients expert_mlp_backward(
    const at::Tensor& grad_output,
    const std::optional<at::Tensor>& grad_output_gram,
    const std::optional<at::Tensor>& grad_activation_gram,
    const at::Tensor& tokens,
    const at::Tensor& weights,
    const at::Tensor& row_order,
    const at::Tensor& offsets,
    const at::Tensor& gate_up,
    const at::Tensor& down,
    const std::optional<at::Tensor>& pre_activation,
    const std::optional<at::Tensor>& rows,
    std::array<bool, 4> needed) {
  static const auto op = find_operator<decltype(expert_mlp_backward)>("edl::_expert_mlp_backward");
  static const auto waiting = find_operator<decltype(expert_mlp_backward)>("edl::_expert_mlp_backward", "waiting");
  return (waits(gate_up, down) ? waiting : op)
      .call(
          grad_output, grad_output_gram, grad_activation_gram, tokens, weights, row_order, offsets, gate_up, down,
          pre_activation, rows, needed);
}

at::Tensor expert_mlp_meta(
    const at::Tensor& tokens,
    const at::Tensor& weights,
    const at::Tensor& row_order,
    const at::Tensor& offsets,
    const at::Tensor& gate_up,
    const at::Tensor& down,
    bool /*recompute_activations*/) {
  check_expert_mlp(kOp, tokens, weights, row_order, offsets, gate_up, down);
  return at::empty_symint(tokens.sym_sizes(), tokens.options());
}

ExpertMlpResults expert_mlp_forward_meta(
    const at::Tensor& tokens,
    const at::Tensor& weights,
    const at::Tensor& row_order,
    const at::Tensor& offsets,
    const at::Tensor& gate_up,
    const at::Tensor& down,
    bool output_gram,
    bool activation_gram) {
  check_expert_mlp(expert_mlp_name(output_gram || activation_gram), tokens, weights, row_order, offsets, gate_up, down);
  const auto accumulated = tokens.options().dtype(accumulation_type(tokens.scalar_type()));
  const auto gram_if = [&](bool is_asked) {
    return is_asked ? at::empty_symint({tokens.sym_size(0), weights.sym_size(1), weights.sym_size(1)}, accumulated)
                    : at::empty({0}, accumulated);
  };
  return {
      at::empty_symint(tokens.sym_sizes(), tokens.options()),
      at::empty_symint({row_order.sym_size(0), gate_up.sym_size(1)}, tokens.options()),
      output_gram ? at::empty_symint({row_order.sym_size(0), tokens.sym_size(1)}, tokens.options())
                  : at::empty({0}, tokens.options()),
      gram_if(output_gram), gram_if(activation_gram)};
}

ExpertMlpGradients expert_mlp_backward_meta(
    const at::Tensor& grad_output,
    const std::optional<at::Tensor>& grad_output_gram,
    const std::optional<at::Tensor>& grad_activation_gram,
    const at::Tensor& tokens,
    const at::Tensor& weights,
    const at::Tensor& row_order,
    const at::Tensor& offsets,
    const at::Tensor& gate_up,
    const at::Tensor& down,
    const std::optional<at::Tensor>& pre_activation,
    const std::optional<at::Tensor>& rows,
    std::array<bool, 4> needed) {
  check_expert_mlp_backward(
      grad_output, grad_output_gram, grad_activation_gram, tokens, weights, row_order, offsets, gate_up, down,
      pre_activation, rows);
  return {
      empty_if(needed[0], tokens), empty_if(needed[1], weights), empty_if(needed[2], gate_up),
      empty_if(needed[3], down)};
}

// ---- below autograd, nothing kept ----

at::Tensor expert_mlp_alone(
    const at::Tensor& tokens,
    const at::Tensor& weights,
    const at::Tensor& row_order,
    const at::Tensor& offsets,
    const at::Tensor& gate_up,
    const at::Tensor& down) {
  if (waits(gate_up, down)) {
    return std::get<0>(expert_mlp_forward(tokens, weights, row_order, offsets, gate_up, down, false, false));
  }
  return expert_mlp(tokens, weights, row_order, offsets, gate_up, down);
}

WithGram expert_mlp_with_gram_below_autograd(
    const at::Tensor& tokens,
    const at::Tensor& weights,
    const at::Tensor& row_order,
    const at::Tensor& offsets,
    const at::Tensor& gate_up,
    const at::Tensor& down,
    bool output_gram,
    bool activation_gram,
    bool /*recompute_activations*/) {
  auto [output, pre_activation, rows, of_outputs, of_activations] =
      expert_mlp_forward(tokens, weights, row_order, offsets, gate_up, down, output_gram, activation_gram);
  return {output, of_outputs, of_activations};
}

// ---- autograd ----

// One for both operators: the output, and behind it the Gram matrices where any is asked for.
struct ExpertMlpFunction : torch::autograd::Function<ExpertMlpFunction> {
  static constexpr bool is_traceable = true;

  static torch::autograd::variable_list forward(
      torch::autograd::AutogradContext* context,
      const at::Tensor& tokens,
      const at::Tensor& weights,
      const at::Tensor& row_order,
      const at::Tensor& offsets,
      const at::Tensor& gate_up,
      const at::Tensor& down,
      bool output_gram,
      bool activation_gram,
      bool recompute_activations) {
    at::AutoDispatchBelowADInplaceOrView guard;
    torch::autograd::variable_list saved = {tokens, weights, row_order, offsets, gate_up, down};
    torch::autograd::variable_list results;
    if (!output_gram && !activation_gram && recompute_activations) {
      results = {expert_mlp_alone(tokens, weights, row_order, offsets, gate_up, down)};
    } else {
      auto [output, pre_activation, rows, of_outputs, of_activations] =
          expert_mlp_forward(tokens, weights, row_order, offsets, gate_up, down, output_gram, activation_gram);
      results = {output};
      if (output_gram || activation_gram) {
        results.insert(results.end(), {of_outputs, of_activations});
      }
      if (!recompute_activations) {
        saved.push_back(pre_activation);
        if (output_gram) {
          saved.push_back(rows);
        }
      }
    }
    context->save_for_backward(std::move(saved));
    context->set_materialize_grads(false);
    return results;
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* context, const torch::autograd::variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const at::Tensor& tokens = saved[0];
    const auto kept = [&](size_t i) { return i < saved.size() ? std::make_optional(saved[i]) : std::nullopt; };
    const std::array<bool, 4> needed = {
        context->needs_input_grad(0), context->needs_input_grad(1), context->needs_input_grad(4),
        context->needs_input_grad(5)};
    const auto gradient_of_gram = [&](size_t i) -> std::optional<at::Tensor> {
      return i < grads.size() && grads[i].defined() && grads[i].dim() == 3 ? std::make_optional(grads[i])
                                                                           : std::nullopt;
    };
    const at::Tensor grad_output =
        grads[0].defined() ? grads[0] : at::zeros_symint(tokens.sym_sizes(), tokens.options());
    auto [grad_tokens, grad_weights, grad_gate_up, grad_down] = expert_mlp_backward(
        grad_output, gradient_of_gram(1), gradient_of_gram(2), tokens, saved[1], saved[2], saved[3], saved[4], saved[5],
        kept(6), kept(7), needed);
    const auto if_needed = [&](size_t i, const at::Tensor& gradient) { return needed[i] ? gradient : at::Tensor(); };
    return {
        if_needed(0, grad_tokens),
        if_needed(1, grad_weights),
        {},
        {},
        if_needed(2, grad_gate_up),
        if_needed(3, grad_down),
        {},
        {},
        {}};
  }
};

at::Tensor expert_mlp_autograd(
    const at::Tensor& tokens,
    const at::Tensor& weights,
    const at::Tensor& row_order,
    const at::Tensor& offsets,
    const at::Tensor& gate_up,
    const at::Tensor& down,
    bool recompute_activations) {
  if (!needs_gradient({tokens, weights, gate_up, down})) { // nothing to save
    at::AutoDispatchBelowADInplaceOrView guard;
    return expert_mlp_alone(tokens, weights, row_order, offsets, gate_up, down);
  }
  return ExpertMlpFunction::apply(
      tokens, weights, row_order, offsets, gate_up, down, false, false, recompute_activations)[0];
}

WithGram expert_mlp_with_gram_autograd(
    const at::Tensor& tokens,
    const at::Tensor& weights,
    const at::Tensor& row_order,
    const at::Tensor& offsets,
    const at::Tensor& gate_up,
    const at::Tensor& down,
    bool output_gram,
    bool activation_gram,
    bool recompute_activations) {
  EDL_ENSURE(
      output_gram || activation_gram, kWithGram,
      ": output_gram or activation_gram must be asked for, or expert_mlp is the operator (got neither)");
  if (!needs_gradient({tokens, weights, gate_up, down})) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return expert_mlp_with_gram(tokens, weights, row_order, offsets, gate_up, down, output_gram, activation_gram);
  }
  auto results = ExpertMlpFunction::apply(
      tokens, weights, row_order, offsets, gate_up, down, output_gram, activation_gram, recompute_activations);
  return {results[0], results[1], results[2]};
}

template <at::DeviceType device>
at::Tensor cast_for_autocast(const at::Tensor& tensor) {
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), tensor, device);
}

template <at::DeviceType device, c10::DispatchKey key>
at::Tensor expert_mlp_autocast(
    const at::Tensor& tokens,
    const at::Tensor& weights,
    const at::Tensor& row_order,
    const at::Tensor& offsets,
    const at::Tensor& gate_up,
    const at::Tensor& down,
    bool recompute_activations) {
  c10::impl::ExcludeDispatchKeyGuard guard(key);
  const auto cast = cast_for_autocast<device>;
  return expert_mlp(cast(tokens), weights, row_order, offsets, cast(gate_up), cast(down), recompute_activations);
}

template <at::DeviceType device, c10::DispatchKey key>
WithGram expert_mlp_with_gram_autocast(
    const at::Tensor& tokens,
    const at::Tensor& weights,
    const at::Tensor& row_order,
    const at::Tensor& offsets,
    const at::Tensor& gate_up,
    const at::Tensor& down,
    bool output_gram,
    bool activation_gram,
    bool recompute_activations) {
  c10::impl::ExcludeDispatchKeyGuard guard(key);
  const auto cast = cast_for_autocast<device>;
  return expert_mlp_with_gram(
      cast(tokens), weights, row_order, offsets, cast(gate_up), cast(down), output_gram, activation_gram,
      recompute_activations);
}

} // namespace
} // namespace edl

TORCH_LIBRARY_FRAGMENT(edl, m) {
  const std::string arguments =
      "Tensor tokens, Tensor weights, Tensor row_order, Tensor offsets, Tensor gate_up, Tensor down";
  m.def(("expert_mlp(" + arguments + ", bool recompute_activations=False) -> Tensor").c_str());
  m.def(("expert_mlp_with_gram(" + arguments +
         ", bool output_gram, bool activation_gram, bool recompute_activations=False) -> (Tensor output, Tensor "
         "output_gram, Tensor activation_gram)")
            .c_str());
  const std::string forward = "(" + arguments +
      ", bool output_gram, bool activation_gram) -> (Tensor output, Tensor pre_activation, Tensor rows, Tensor "
      "output_gram, Tensor activation_gram)";
  const std::string backward = "(Tensor grad_output, Tensor? grad_output_gram, Tensor? grad_activation_gram, " +
      arguments + ", Tensor? pre_activation, Tensor? rows, bool[4] needed) -> (Tensor, Tensor, Tensor, Tensor)";
  m.def(("_expert_mlp_forward" + forward).c_str());
  m.def(("_expert_mlp_backward" + backward).c_str());
  // The same, for experts whose products wait for the device: torch.compile splits its CUDA graphs there.
  m.def(("_expert_mlp_forward.waiting" + forward).c_str(), {at::Tag::cudagraph_unsafe});
  m.def(("_expert_mlp_backward.waiting" + backward).c_str(), {at::Tag::cudagraph_unsafe});
}

TORCH_LIBRARY_IMPL(edl, CompositeExplicitAutograd, m) {
  m.impl("expert_mlp_with_gram", edl::expert_mlp_with_gram_below_autograd);
}

TORCH_LIBRARY_IMPL(edl, Meta, m) {
  m.impl("expert_mlp", edl::expert_mlp_meta);
  m.impl("_expert_mlp_forward", edl::expert_mlp_forward_meta);
  m.impl("_expert_mlp_forward.waiting", edl::expert_mlp_forward_meta);
  m.impl("_expert_mlp_backward", edl::expert_mlp_backward_meta);
  m.impl("_expert_mlp_backward.waiting", edl::expert_mlp_backward_meta);
}

TORCH_LIBRARY_IMPL(edl, Autograd, m) {
  m.impl("expert_mlp", edl::expert_mlp_autograd);
  m.impl("expert_mlp_with_gram", edl::expert_mlp_with_gram_autograd);
  for (const char* name :
       {"_expert_mlp_forward", "_expert_mlp_forward.waiting", "_expert_mlp_backward", "_expert_mlp_backward.waiting"}) {
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
  }
}

TORCH_LIBRARY_IMPL(edl, AutocastCPU, m) {
  m.impl("expert_mlp", (edl::expert_mlp_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>));
  m.impl("expert_mlp_with_gram", (edl::expert_mlp_with_gram_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>));
}

TORCH_LIBRARY_IMPL(edl, Autocast, m) { // CUDA
  m.impl("expert_mlp", (edl::expert_mlp_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>));
  m.impl("expert_mlp_with_gram", (edl::expert_mlp_with_gram_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>));
}
