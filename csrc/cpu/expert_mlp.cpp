// expert_mlp on the CPU: tokens [T, H], weights [T, K], row_order [N], offsets [E + 1], gate_up [E, 2I, H], down [E, H, I]
// → output [T, H].
//
// Expert by expert: gather its tokens, one matrix product, SwiGLU, one matrix product, add the weighted rows to the tokens'
// sums. The products are at::mm in the type of tokens; sums over a token's experts are float32 (float64 for float64).
// Scratch: the rows of the busiest expert, and [T, H] in float32 for 16-bit tokens. An expert without tokens costs nothing
// forward, and writes zeros backward.
#include "ops/expert_mlp.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>

#include "common/dtypes.h"
#include "common/errors.h"
#include "common/tensors.h"
#include "cpu/isa/expert_mlp.h"
#include "cpu/row_order.h"

namespace edl {
namespace {

constexpr const char* kOp = "edl::expert_mlp";
constexpr int64_t kGrainElements = 1 << 14; // work below this is not worth a thread
constexpr int64_t kGrainColumns = 64; //       columns of one thread fill whole cache lines

int64_t grain_rows(int64_t width) {
  return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, width));
}

// The index space of one call, dense and checked.
struct Rows {
  at::Tensor order;
  at::Tensor bounds;
  at::Tensor factors; //  [T, K], accumulation type
  int64_t top_k;
  int64_t most = 0; //    rows of the busiest expert

  const int32_t* slots(int64_t expert) const {
    return order.const_data_ptr<int32_t>() + begin(expert);
  }
  int64_t begin(int64_t expert) const {
    return bounds.const_data_ptr<int32_t>()[expert];
  }
  int64_t count(int64_t expert) const {
    return begin(expert + 1) - begin(expert);
  }
  int64_t num_experts() const {
    return bounds.size(0) - 1;
  }
};

Rows checked_rows(const at::Tensor& weights, const at::Tensor& row_order, const at::Tensor& offsets) {
  const auto type = accumulation_type(weights.scalar_type());
  Rows rows{row_order.contiguous(), offsets.contiguous(), weights.to(type).contiguous(), weights.size(1)};
  const int64_t num_rows = row_order.size(0);
  int64_t previous = 0;
  for (int64_t e = 0; e <= rows.num_experts(); ++e) {
    const int64_t bound = rows.begin(e);
    EDL_CHECK_INDEX(
        bound >= previous && bound <= num_rows && (e > 0 || bound == 0), kOp,
        ": offsets must rise from 0 to at most ", num_rows, ", the number of rows (got ", bound, " at position ", e, ")");
    rows.most = std::max(rows.most, bound - previous);
    previous = bound;
  }
  rows_of_slots(kOp, rows.order.const_data_ptr<int32_t>(), num_rows);
  return rows;
}

// to[i] = the token of slots[i], for n rows.
void gather(const at::Tensor& tokens, const int32_t* slots, int64_t top_k, const at::Tensor& to) {
  const auto* source = static_cast<const char*>(tokens.const_data_ptr());
  auto* target = static_cast<char*>(to.mutable_data_ptr());
  const int64_t width = to.size(1) * to.element_size();
  const int64_t stride = tokens.stride(0) * tokens.element_size();
  at::parallel_for(0, to.size(0), grain_rows(to.size(1)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      std::memcpy(target + i * width, source + slots[i] / top_k * stride, width);
    }
  });
}

void activate(const at::Tensor& pre_activation, const at::Tensor& activation) {
  const SwigluTask task{pre_activation.const_data_ptr(), activation.size(1), activation.mutable_data_ptr()};
  const auto swiglu = expert_mlp_loops().swiglu[static_cast<int>(storage_of(activation))];
  at::parallel_for(0, activation.size(0), grain_rows(activation.size(1)), [&](int64_t begin, int64_t end) {
    swiglu(task, begin, end);
  });
}

// sums[token] += weight · row; without weights, += row.
void add_to_tokens(const at::Tensor& rows, const int32_t* slots, int64_t top_k, const void* weights, const at::Tensor& sums) {
  const AddRowsTask task{
      rows.const_data_ptr(), rows.size(0), slots, top_k, weights, rows.size(1), sums.mutable_data_ptr()};
  const auto add_rows = expert_mlp_loops().add_rows[static_cast<int>(storage_of(rows))];
  const int64_t blocks = (rows.size(1) + kGrainColumns - 1) / kGrainColumns;
  const int64_t grain = std::max<int64_t>(1, grain_rows(rows.size(0)) / kGrainColumns);
  at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    add_rows(task, begin * kGrainColumns, std::min(rows.size(1), end * kGrainColumns));
  });
}

at::Tensor zero_sums(const at::Tensor& tokens) {
  return at::zeros(tokens.sizes(), tokens.options().dtype(accumulation_type(tokens.scalar_type())));
}

at::Tensor scratch(const Rows& rows, int64_t width, const at::Tensor& like) {
  return at::empty({rows.most, width}, like.options());
}

// `pre_activation` [N, 2I] keeps the rows for the backward pass; undefined, only the expert at work has any.
at::Tensor run_experts(
    const at::Tensor& tokens,
    const Rows& rows,
    const at::Tensor& gate_up,
    const at::Tensor& down,
    const at::Tensor& pre_activation) {
  const at::Tensor source = with_dense_rows(tokens);
  const at::Tensor sums = zero_sums(tokens);
  const at::Tensor inputs = scratch(rows, tokens.size(1), tokens);
  const at::Tensor hidden = pre_activation.defined() ? pre_activation : scratch(rows, gate_up.size(1), tokens);
  const at::Tensor activations = scratch(rows, down.size(2), tokens);
  for (int64_t e = 0; e < rows.num_experts(); ++e) {
    const int64_t count = rows.count(e);
    if (count == 0) {
      continue;
    }
    at::Tensor in = inputs.narrow(0, 0, count);
    at::Tensor pre = hidden.narrow(0, pre_activation.defined() ? rows.begin(e) : 0, count);
    const at::Tensor activation = activations.narrow(0, 0, count);
    gather(source, rows.slots(e), rows.top_k, in);
    at::mm_out(pre, in, gate_up.select(0, e).t());
    activate(pre, activation);
    at::mm_out(in, activation, down.select(0, e).t()); // the tokens are no longer needed
    add_to_tokens(in, rows.slots(e), rows.top_k, rows.factors.const_data_ptr(), sums);
  }
  return sums.to(tokens.scalar_type());
}

at::Tensor expert_mlp_cpu(
    const at::Tensor& tokens,
    const at::Tensor& weights,
    const at::Tensor& row_order,
    const at::Tensor& offsets,
    const at::Tensor& gate_up,
    const at::Tensor& down) {
  check_expert_mlp(tokens, weights, row_order, offsets, gate_up, down);
  return run_experts(tokens, checked_rows(weights, row_order, offsets), gate_up, down, at::Tensor());
}

std::tuple<at::Tensor, at::Tensor> expert_mlp_forward_cpu(
    const at::Tensor& tokens,
    const at::Tensor& weights,
    const at::Tensor& row_order,
    const at::Tensor& offsets,
    const at::Tensor& gate_up,
    const at::Tensor& down) {
  check_expert_mlp(tokens, weights, row_order, offsets, gate_up, down);
  const Rows rows = checked_rows(weights, row_order, offsets);
  at::Tensor pre_activation = at::empty({row_order.size(0), gate_up.size(1)}, tokens.options());
  const int64_t used = rows.begin(rows.num_experts());
  pre_activation.narrow(0, used, row_order.size(0) - used).zero_(); // sentinels
  return {run_experts(tokens, rows, gate_up, down, pre_activation), pre_activation};
}

// The gradients of one call; those that nobody needs are empty.
struct Gradients {
  at::Tensor token_sums; //  [T, H], accumulation type
  at::Tensor factors; //     [T, K], accumulation type
  at::Tensor gate_up;
  at::Tensor down;
};

struct BackwardScratch {
  at::Tensor grad_rows; //           [n, H]
  at::Tensor inputs; //              [n, H]
  at::Tensor activation; //          [n, I]
  at::Tensor grad_activation; //     [n, I]
  at::Tensor grad_pre_activation; // [n, 2I]

  BackwardScratch first(int64_t count) const {
    const auto cut = [=](const at::Tensor& tensor) { return tensor.narrow(0, 0, count); };
    return {cut(grad_rows), cut(inputs), cut(activation), cut(grad_activation), cut(grad_pre_activation)};
  }
};

void swiglu_backward(
    const at::Tensor& pre_activation,
    const int32_t* slots,
    const Rows& rows,
    const BackwardScratch& own,
    const at::Tensor& grad_factors) {
  const SwigluGradient task{
      pre_activation.const_data_ptr(), own.grad_activation.const_data_ptr(), slots, rows.factors.const_data_ptr(),
      own.activation.size(1), own.activation.mutable_data_ptr(), own.grad_pre_activation.mutable_data_ptr(),
      grad_factors.mutable_data_ptr()};
  const auto loop = expert_mlp_loops().swiglu_backward[static_cast<int>(storage_of(pre_activation))];
  at::parallel_for(0, pre_activation.size(0), grain_rows(own.activation.size(1)), [&](int64_t begin, int64_t end) {
    loop(task, begin, end);
  });
}

// With G the gradient of the expert's rows before their weights w, and A the activation: <G down, A> is the gradient of w,
// so the expert's output is not needed again; G^T (w A) is that of down.
void backward_of_expert(
    int64_t e,
    const at::Tensor& grad_output,
    const at::Tensor& tokens,
    const Rows& rows,
    const at::Tensor& gate_up,
    const at::Tensor& down,
    const at::Tensor& pre_activation,
    BackwardScratch own,
    std::array<bool, 4> needed,
    Gradients* gradients) {
  const int32_t* slots = rows.slots(e);
  gather(grad_output, slots, rows.top_k, own.grad_rows);
  at::mm_out(own.grad_activation, own.grad_rows, down.select(0, e));
  swiglu_backward(pre_activation.narrow(0, rows.begin(e), rows.count(e)), slots, rows, own, gradients->factors);
  if (needed[3]) {
    at::Tensor grad_down = gradients->down.select(0, e);
    at::mm_out(grad_down, own.grad_rows.t(), own.activation);
  }
  if (needed[2]) {
    gather(tokens, slots, rows.top_k, own.inputs);
    at::Tensor grad_gate_up = gradients->gate_up.select(0, e);
    at::mm_out(grad_gate_up, own.grad_pre_activation.t(), own.inputs);
  }
  if (needed[0]) {
    at::mm_out(own.inputs, own.grad_pre_activation, gate_up.select(0, e));
    add_to_tokens(own.inputs, slots, rows.top_k, nullptr, gradients->token_sums);
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> expert_mlp_backward_cpu(
    const at::Tensor& grad_output,
    const at::Tensor& tokens,
    const at::Tensor& weights,
    const at::Tensor& row_order,
    const at::Tensor& offsets,
    const at::Tensor& gate_up,
    const at::Tensor& down,
    const at::Tensor& pre_activation,
    std::array<bool, 4> needed) {
  check_expert_mlp_backward(grad_output, tokens, weights, row_order, offsets, gate_up, down, pre_activation);
  const Rows rows = checked_rows(weights, row_order, offsets);
  const at::Tensor grad = with_dense_rows(grad_output);
  const at::Tensor source = with_dense_rows(tokens);
  const at::Tensor hidden = pre_activation.contiguous();
  const auto empty_if = [&](bool is_needed, const at::Tensor& input) {
    return is_needed ? at::empty(input.sizes(), input.options()) : at::empty({0}, input.options());
  };
  Gradients gradients{
      needed[0] ? zero_sums(tokens) : at::empty({0}, tokens.options()),
      at::zeros(rows.factors.sizes(), rows.factors.options()), // zero for sentinels
      empty_if(needed[2], gate_up), empty_if(needed[3], down)};
  const int64_t width = down.size(2);
  const BackwardScratch whole{
      scratch(rows, tokens.size(1), tokens), scratch(rows, tokens.size(1), tokens), scratch(rows, width, tokens),
      scratch(rows, width, tokens), scratch(rows, 2 * width, tokens)};
  for (int64_t e = 0; e < rows.num_experts(); ++e) {
    if (rows.count(e) > 0) {
      backward_of_expert(
          e, grad, source, rows, gate_up, down, hidden, whole.first(rows.count(e)), needed, &gradients);
      continue;
    }
    if (needed[2]) {
      gradients.gate_up.select(0, e).zero_();
    }
    if (needed[3]) {
      gradients.down.select(0, e).zero_();
    }
  }
  return {
      gradients.token_sums.to(tokens.scalar_type()),
      needed[1] ? gradients.factors.to(weights.scalar_type()) : at::empty({0}, weights.options()), gradients.gate_up,
      gradients.down};
}

} // namespace
} // namespace edl

TORCH_LIBRARY_IMPL(edl, CPU, m) {
  m.impl("expert_mlp", edl::expert_mlp_cpu);
  m.impl("_expert_mlp_forward", edl::expert_mlp_forward_cpu);
  m.impl("_expert_mlp_backward", edl::expert_mlp_backward_cpu);
}
