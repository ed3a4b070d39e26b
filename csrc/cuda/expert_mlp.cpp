// expert_mlp on CUDA, host side: tokens [T, H], weights [T, K], row_order [N], offsets [E + 1], gate_up [E, 2I, H],
// down [E, H, I] → output [T, H].
//
// Gather the tokens' rows, one product for all experts, SwiGLU, one product, add up the rows of each token in float32
// (float64 for float64) in the order of its choices. The products are those of expert_products.h; all else are our
// kernels, which zero what no expert owns, so that no uninitialised memory is read. Backward gathers the tokens again
// rather than saving their rows, and needs no expert's output: with G the gradient of the rows before their weights w,
// and A the activation, <G down, A> is the gradient of w. Without the pre-activation it begins with the forward's first
// product, and for the gradient of output_gram with both. Scratch: N (2 H + 3 I) elements forward, N (3 H + 4 I)
// backward, and N 2 I for a pre-activation that was not kept.
#include "ops/expert_mlp.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <limits>

#include "common/dtypes.h"
#include "cuda/device.h"
#include "cuda/expert_products.h"
#include "cuda/kernels/expert_mlp.h"
#include "cuda/rows.h"
#include "cuda/token_gram.h"

namespace edl::cuda {
namespace {

constexpr const char* kOp = "edl::expert_mlp";

// The index space and the weights, dense. Offsets that the CPU refuses leave an order without slots.
struct Rows {
  Rows(const at::Tensor& row_order, const at::Tensor& all_offsets, const at::Tensor& all_weights)
      : order(at::empty(row_order.sizes(), row_order.options())),
        offsets(at::empty(all_offsets.sizes(), all_offsets.options())),
        weights(all_weights.to(accumulation_type(all_weights.scalar_type())).contiguous()) {
    const at::Tensor dense_order = row_order.contiguous();
    const at::Tensor dense_offsets = all_offsets.contiguous();
    if (count() > 0) {
      launch_check_rows(
          {.offsets = dense_offsets.const_data_ptr<int32_t>(),
           .row_order = dense_order.const_data_ptr<int32_t>(),
           .num_experts = static_cast<int32_t>(offsets.size(0) - 1),
           .num_rows = static_cast<int32_t>(count()),
           .checked_offsets = offsets.mutable_data_ptr<int32_t>(),
           .checked_order = order.mutable_data_ptr<int32_t>()},
          stream_of(order));
    }
  }

  int64_t count() const {
    return order.size(0);
  }
  int64_t top_k() const {
    return weights.size(1);
  }
  const int32_t* num_used() const { // offsets[E], on the device
    return offsets.const_data_ptr<int32_t>() + offsets.size(0) - 1;
  }

  at::Tensor order;
  at::Tensor offsets;
  at::Tensor weights; // [T, K], accumulation type
};

// EDL_CHECK=1: the CPU's checks of the indices, on experts of size 1.
void check_values(const at::Tensor& weights, const at::Tensor& row_order, const at::Tensor& offsets) {
  const int64_t num_experts = offsets.size(0) - 1;
  expert_mlp(
      at::zeros({weights.size(0), 1}), at::ones({weights.size(0), weights.size(1)}), row_order.cpu(), offsets.cpu(),
      at::zeros({num_experts, 2, 1}), at::zeros({num_experts, 1, 1}));
}

bool is_empty(const at::Tensor& tokens, const Rows& rows, const at::Tensor& down) {
  return rows.count() == 0 || tokens.size(1) == 0 || down.size(2) == 0;
}

// silu(gate) * up, [N, I]; zeros the rows of pre_activation that have no expert.
at::Tensor activate(const Rows& rows, at::Tensor& pre_activation) {
  const int64_t width = pre_activation.size(1) / 2;
  at::Tensor activation = at::empty({rows.count(), width}, pre_activation.options());
  launch_swiglu(
      {.pre_activation = pre_activation.mutable_data_ptr(),
       .storage = storage_of(pre_activation),
       .num_rows = rows.count(),
       .num_used = rows.num_used(),
       .width = width,
       .activation = activation.mutable_data_ptr()},
      stream_of(activation));
  return activation;
}

struct Activations {
  at::Tensor pre_activation; // [N, 2I]
  at::Tensor activation; //     [N, I]
};

Activations activations_of(
    const Rows& rows, const ExpertProducts& products, const at::Tensor& tokens, const at::Tensor& gate_up) {
  const at::Tensor inputs = gather_rows(tokens, rows.order, rows.top_k(), rows.num_used());
  at::Tensor pre_activation = products.by_row(inputs, gate_up.transpose(1, 2));
  const at::Tensor activation = activate(rows, pre_activation);
  return {pre_activation, activation};
}

at::Tensor gram_if(bool is_asked, const Rows& rows, const at::Tensor& of_rows, const at::Tensor& row_of_slot) {
  return is_asked ? grams_of(of_rows, row_of_slot, rows.weights, rows.top_k()) : at::empty({0}, rows.weights.options());
}

ExpertMlpResults expert_mlp_forward_cuda(
    const at::Tensor& tokens,
    const at::Tensor& weights,
    const at::Tensor& row_order,
    const at::Tensor& offsets,
    const at::Tensor& gate_up,
    const at::Tensor& down,
    bool output_gram,
    bool activation_gram) {
  const char* op = expert_mlp_name(output_gram || activation_gram);
  check_expert_mlp(op, tokens, weights, row_order, offsets, gate_up, down);
  const c10::cuda::CUDAGuard guard(tokens.device());
  if (values_are_checked(op)) {
    check_values(weights, row_order, offsets);
  }
  const Rows rows(row_order, offsets, weights);
  if (is_empty(tokens, rows, down)) {
    const auto zeros_if = [&](bool is_asked) {
      return is_asked ? at::zeros({tokens.size(0), rows.top_k(), rows.top_k()}, rows.weights.options())
                      : at::empty({0}, rows.weights.options());
    };
    return {
        at::zeros(tokens.sizes(), tokens.options()), at::zeros({rows.count(), gate_up.size(1)}, tokens.options()),
        output_gram ? at::zeros({rows.count(), tokens.size(1)}, tokens.options()) : at::empty({0}, tokens.options()),
        zeros_if(output_gram), zeros_if(activation_gram)};
  }
  const ExpertProducts products(op, rows.offsets, gate_up, down);
  const at::Tensor first = products.dense(gate_up);
  const at::Tensor second = products.dense(down);
  const auto [pre_activation, activation] = activations_of(rows, products, tokens, first);
  const at::Tensor outputs = products.by_row(activation, second.transpose(1, 2));
  const at::Tensor row_of_slot = rows_of_slots(rows.order, rows.num_used());
  const at::Tensor output = combine_rows(outputs, row_of_slot, rows.weights, rows.top_k());
  const ExpertMlpResults results = {
      output, pre_activation, output_gram ? outputs : at::empty({0}, tokens.options()),
      gram_if(output_gram, rows, outputs, row_of_slot), gram_if(activation_gram, rows, activation, row_of_slot)};
  check_launch(op);
  return results;
}

at::Tensor expert_mlp_cuda(
    const at::Tensor& tokens,
    const at::Tensor& weights,
    const at::Tensor& row_order,
    const at::Tensor& offsets,
    const at::Tensor& gate_up,
    const at::Tensor& down,
    bool /*recompute_activations*/) {
  return std::get<0>(expert_mlp_forward_cuda(tokens, weights, row_order, offsets, gate_up, down, false, false));
}

// The gradient of the outputs before the weights, [N, H]: of the tokens' outputs, and of their Gram matrices.
struct OutputGradients {
  at::Tensor grad_rows;
  at::Tensor grad_weights; // [T, K], accumulation type
};

OutputGradients gradients_of_outputs(
    const Rows& rows, const at::Tensor& grad_output, const at::Tensor& grad_gram, const at::Tensor& outputs) {
  const at::Tensor grad = with_dense_rows(grad_output);
  const at::Tensor of_gram = grad_gram.contiguous();
  const at::Tensor row_of_slot = rows_of_slots(rows.order, rows.num_used());
  OutputGradients result = {
      at::empty(outputs.sizes(), outputs.options()),
      at::full_like(rows.weights, std::numeric_limits<double>::quiet_NaN())}; // of slots that no row names
  launch_token_gram_backward(
      {.tokens = token_rows(outputs, row_of_slot, rows.weights, rows.top_k()),
       .grad_gram = of_gram.const_data_ptr(),
       .row_order = rows.order.const_data_ptr<int32_t>(),
       .num_used = rows.num_used(),
       .grad_output = grad.const_data_ptr(),
       .grad_output_stride = grad.stride(0),
       .grad_weights = result.grad_weights.mutable_data_ptr(),
       .grad_rows = result.grad_rows.mutable_data_ptr()},
      stream_of(outputs));
  return result;
}

// The gradient of the activations that their Gram matrices have, [N, I]. The activations are computed once more.
at::Tensor gradient_of_activations(const Rows& rows, const at::Tensor& grad_gram, const at::Tensor& pre_activation) {
  at::Tensor kept = pre_activation; // rows without an expert are zeros already
  const at::Tensor activation = activate(rows, kept);
  const at::Tensor of_gram = grad_gram.contiguous();
  const at::Tensor row_of_slot = rows_of_slots(rows.order, rows.num_used());
  at::Tensor grad_rows = at::empty(activation.sizes(), activation.options());
  launch_token_gram_backward(
      {.tokens = token_rows(activation, row_of_slot, rows.weights, rows.top_k()),
       .grad_gram = of_gram.const_data_ptr(),
       .row_order = rows.order.const_data_ptr<int32_t>(),
       .num_used = rows.num_used(),
       .grad_output = nullptr,
       .grad_output_stride = 0,
       .grad_weights = nullptr,
       .grad_rows = grad_rows.mutable_data_ptr()},
      stream_of(activation));
  return grad_rows;
}

// What the SwiGLU's backward pass leaves for the products after it.
struct ActivationGradients {
  at::Tensor activation; //          [N, I], with the weights
  at::Tensor grad_pre_activation; // [N, 2I], with the weights
  at::Tensor grad_weights; //        [T, K], accumulation type
};

ActivationGradients activate_backward(
    const Rows& rows,
    const at::Tensor& weights, //           [T, K], accumulation type
    const at::Tensor& pre_activation, //    [N, 2I]
    const at::Tensor& grad_activation, //   [N, I]
    const at::Tensor& more) { //            [N, I], or undefined
  ActivationGradients gradients = {
      at::empty(grad_activation.sizes(), grad_activation.options()),
      at::empty(pre_activation.sizes(), grad_activation.options()),
      at::full_like(rows.weights, std::numeric_limits<double>::quiet_NaN())}; // of slots that no row names
  launch_swiglu_backward(
      {.pre_activation = pre_activation.const_data_ptr(),
       .grad_activation = grad_activation.const_data_ptr(),
       .storage = storage_of(pre_activation),
       .row_order = rows.order.const_data_ptr<int32_t>(),
       .weights = weights.const_data_ptr(),
       .num_rows = rows.count(),
       .num_used = rows.num_used(),
       .width = grad_activation.size(1),
       .activation = gradients.activation.mutable_data_ptr(),
       .grad_pre_activation = gradients.grad_pre_activation.mutable_data_ptr(),
       .grad_weights = gradients.grad_weights.mutable_data_ptr(),
       .more = more.defined() ? more.const_data_ptr() : nullptr},
      stream_of(pre_activation));
  return gradients;
}

ExpertMlpGradients zero_gradients(
    const at::Tensor& tokens,
    const at::Tensor& weights,
    const at::Tensor& gate_up,
    const at::Tensor& down,
    std::array<bool, 4> needed) {
  const auto zeros_if = [](bool wanted, const at::Tensor& like) {
    return wanted ? at::zeros(like.sizes(), like.options()) : at::empty({0}, like.options());
  };
  return {
      zeros_if(needed[0], tokens), zeros_if(needed[1], weights), zeros_if(needed[2], gate_up),
      zeros_if(needed[3], down)};
}

ExpertMlpGradients expert_mlp_backward_cuda(
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
    const std::optional<at::Tensor>& rows_of_outputs,
    std::array<bool, 4> needed) {
  check_expert_mlp_backward(
      grad_output, grad_output_gram, grad_activation_gram, tokens, weights, row_order, offsets, gate_up, down,
      pre_activation, rows_of_outputs);
  const c10::cuda::CUDAGuard guard(tokens.device());
  const Rows rows(row_order, offsets, weights);
  if (is_empty(tokens, rows, down)) {
    return zero_gradients(tokens, weights, gate_up, down, needed);
  }
  const ExpertProducts products(kOp, rows.offsets, gate_up, down);
  const at::Tensor first = products.dense(gate_up);
  const at::Tensor second = products.dense(down);
  at::Tensor kept = dense_if(pre_activation, tokens.scalar_type());
  at::Tensor outputs = dense_if(rows_of_outputs, tokens.scalar_type());
  if (!kept.defined()) {
    const Activations again = activations_of(rows, products, tokens, first);
    kept = again.pre_activation;
    if (grad_output_gram.has_value()) {
      outputs = products.by_row(again.activation, second.transpose(1, 2));
    }
  }
  at::Tensor grad_rows, grad_weights, factors = rows.weights, more;
  if (grad_output_gram.has_value()) { // the weights are in these rows: what is left of them is who takes part
    const OutputGradients of_outputs = gradients_of_outputs(rows, grad_output, *grad_output_gram, outputs);
    grad_rows = of_outputs.grad_rows;
    grad_weights = of_outputs.grad_weights;
    factors = rows.weights.ne(0).to(rows.weights.scalar_type());
  } else {
    grad_rows = gather_rows(grad_output, rows.order, rows.top_k(), rows.num_used());
  }
  if (grad_activation_gram.has_value()) {
    more = gradient_of_activations(rows, *grad_activation_gram, kept);
  }
  const at::Tensor grad_activation = products.by_row(grad_rows, second);
  const ActivationGradients own = activate_backward(rows, factors, kept, grad_activation, more);
  at::Tensor grad_tokens = at::empty({0}, tokens.options());
  at::Tensor grad_gate_up = at::empty({0}, gate_up.options());
  at::Tensor grad_down = at::empty({0}, down.options());
  if (needed[3]) {
    grad_down = products.by_expert(grad_rows, own.activation);
  }
  if (needed[2]) {
    const at::Tensor inputs = gather_rows(tokens, rows.order, rows.top_k(), rows.num_used(), rows.weights);
    grad_gate_up = products.by_expert(own.grad_pre_activation, inputs);
  }
  if (needed[0]) {
    const at::Tensor grad_inputs = products.by_row(own.grad_pre_activation, first);
    const at::Tensor row_of_slot = rows_of_slots(rows.order, rows.num_used());
    grad_tokens = combine_rows(grad_inputs, row_of_slot, rows.weights, rows.top_k(), /*already_weighted=*/true);
  }
  check_launch(kOp);
  if (!grad_weights.defined()) {
    grad_weights = own.grad_weights;
  }
  return {
      grad_tokens, needed[1] ? grad_weights.to(weights.scalar_type()) : at::empty({0}, weights.options()), grad_gate_up,
      grad_down};
}

} // namespace
} // namespace edl::cuda

TORCH_LIBRARY_IMPL(edl, CUDA, m) {
  m.impl("expert_mlp", edl::cuda::expert_mlp_cuda);
  m.impl("_expert_mlp_forward", edl::cuda::expert_mlp_forward_cuda);
  m.impl("_expert_mlp_forward.waiting", edl::cuda::expert_mlp_forward_cuda);
  m.impl("_expert_mlp_backward", edl::cuda::expert_mlp_backward_cuda);
  m.impl("_expert_mlp_backward.waiting", edl::cuda::expert_mlp_backward_cuda);
}
