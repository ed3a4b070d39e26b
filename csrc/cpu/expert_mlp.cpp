// expert_mlp on the CPU: tokens [T, H], weights [T, K], row_order [N], offsets [E + 1], gate_up [E, 2I, H],
// down [E, H, I] → output [T, H].
//
// Windows of rows, one after the other; in each, stages of independent tasks, which threads take as they come free:
//
//   forward    [gather_tokens ─►] activations (rows x columns of I) ─► output (columns of H)
//   backward   [gather_gradients ─►] grad_activations (rows x columns of I) ─► grad_tokens (columns of H), grad_factors,
//                                                                       grad_gate_up, grad_down (blocks)
//
// Everything is summed in float32 (float64 for float64), and multiplied in it, but for bfloat16 on matrix units, whose
// loops multiply bfloat16 and gather in stages of their own. Each result is written by one task, in an order that the
// routing alone decides: the same bits for any number of threads. Scratch: 4 MiB per thread (or the rows of one task,
// where they are more) for a window; per thread what `cut` says; for 16-bit tokens T·H, and 3·I·H where an expert has
// more rows than a window, in float32. A backward pass that is not given the pre-activation computes it first, window by
// window; where Gram matrices have gradients, that of all rows before.
#include "ops/expert_mlp.h"

#include <ATen/Parallel.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <vector>

#include "common/dtypes.h"
#include "common/errors.h"
#include "common/tensors.h"
#include "cpu/expert_mlp_plan.h"
#include "cpu/expert_mlp_tiles.h"
#include "cpu/pages.h"
#include "cpu/row_order.h"
#include "cpu/token_gram.h"

namespace edl::cpu {
namespace {

constexpr const char* kOp = "edl::expert_mlp";
constexpr int64_t kWindowBytes = 4 << 20; //   per thread: a window stays in the outer cache
constexpr int64_t kGrainOperations = 1 << 20; // work below this is not worth a thread

// The arguments of one call, checked and with dense rows.
struct Arguments {
  at::Tensor tokens;
  at::Tensor factors; // [T, K], accumulation type
  at::Tensor order;
  at::Tensor bounds;
  at::Tensor gate_up;
  at::Tensor down;
  std::vector<int32_t> row_of_slot;

  int64_t num_used() const { // rows from here on have no expert
    return bounds.const_data_ptr<int32_t>()[bounds.size(0) - 1];
  }
};

at::Tensor with_dense_last(const at::Tensor& tensor) {
  return tensor.stride(-1) == 1 || tensor.size(-1) == 1 ? tensor : tensor.contiguous();
}

void check_offsets(const char* op, const at::Tensor& order, const at::Tensor& bounds) {
  const int32_t* offsets = bounds.const_data_ptr<int32_t>();
  int64_t previous = 0;
  for (int64_t e = 0; e < bounds.size(0); ++e) {
    EDL_ENSURE_INDEX(
        offsets[e] >= previous && offsets[e] <= order.size(0) && (e > 0 || offsets[e] == 0), op,
        ": offsets must rise from 0 to at most ", order.size(0), ", the number of rows (got ", offsets[e],
        " at position ", e, ")");
    previous = offsets[e];
  }
}

Arguments dense(
    const char* op,
    const at::Tensor& tokens,
    const at::Tensor& weights,
    const at::Tensor& row_order,
    const at::Tensor& offsets,
    const at::Tensor& gate_up,
    const at::Tensor& down) {
  Arguments arguments{
      with_dense_rows(tokens),
      weights.to(accumulation_type(weights.scalar_type())).contiguous(),
      row_order.contiguous(),
      offsets.contiguous(),
      with_dense_last(gate_up),
      with_dense_last(down),
      {}};
  check_offsets(op, arguments.order, arguments.bounds);
  arguments.row_of_slot = rows_of_slots(op, arguments.order.const_data_ptr<int32_t>(), arguments.order.size(0));
  return arguments;
}

// The loops that this processor runs for a type.
const ExpertMlpLoops& loops_of(StorageType storage) {
  const ExpertMlpLoops* tiles = storage == StorageType::bfloat16 ? expert_mlp_tiles() : nullptr;
  return tiles != nullptr ? *tiles : expert_mlp_loops().of[static_cast<int>(storage)];
}

// A thread's tiles, or whatever the loops set around their tasks.
class Entered {
 public:
  explicit Entered(const ExpertMlpLoops& loops) : loops_(loops) {
    if (loops_.enter != nullptr) {
      loops_.enter(found_);
    }
  }
  ~Entered() {
    if (loops_.leave != nullptr) {
      loops_.leave(found_);
    }
  }
  Entered(const Entered&) = delete;
  Entered& operator=(const Entered&) = delete;

 private:
  const ExpertMlpLoops& loops_;
  alignas(64) char found_[64];
};

class ExpertMlp {
 public:
  ExpertMlp(
      const Arguments& arguments, const at::Tensor& sums, const at::Tensor& pre_activation, ExpertMlpPasses passes)
      : loops_(loops_of(storage_of(arguments.tokens))),
        num_experts_(arguments.gate_up.size(0)),
        offsets_(arguments.bounds.const_data_ptr<int32_t>()),
        options_(sums.options()) {
    task.hidden_size = arguments.tokens.size(1);
    task.intermediate_size = arguments.down.size(2);
    task.top_k = arguments.factors.size(1);
    task.slots = arguments.order.const_data_ptr<int32_t>();
    task.factors = arguments.factors.const_data_ptr();
    task.tokens = arguments.tokens.const_data_ptr();
    task.tokens_stride = arguments.tokens.stride(0);
    task.gate_up = arguments.gate_up.const_data_ptr();
    task.down = arguments.down.const_data_ptr();
    for (int64_t dim : {0, 1}) {
      task.gate_up_strides[dim] = arguments.gate_up.stride(dim);
      task.down_strides[dim] = arguments.down.stride(dim);
    }
    task.pre_activation = pre_activation.defined() ? pre_activation.data_ptr() : nullptr;
    task.sums = sums.mutable_data_ptr();
    kept_row_bytes_ = 2 * task.intermediate_size * arguments.tokens.element_size();
    cut_ = loops_.cut(task.hidden_size, task.intermediate_size);
    const int64_t operations =
        (passes.backward ? 12 : 6) * offsets_[num_experts_] * task.hidden_size * task.intermediate_size;
    num_threads_ = std::clamp<int64_t>(operations / kGrainOperations, 1, at::get_num_threads());
    allocate(passes);
    if (passes.backward && accumulation_type(arguments.tokens.scalar_type()) != arguments.tokens.scalar_type()) {
      allocate_carried();
    }
  }

  void forward(bool with_output) {
    const auto output_columns = with_output ? cut_columns(task.hidden_size, num_threads_) : std::vector<Columns>();
    for (const Window& window : windows_) {
      task.window_begin = window.begin();
      over_blocks(window, loops_.gather_tokens);
      over_rows(window, cut_.activation_columns, loops_.activations);
      run(output_columns.size(), [&](int64_t i, void* own) {
        loops_.output(task, window.experts.data(), window.experts.size(), output_columns[i], own);
      });
    }
  }

  void backward(std::array<bool, 4> needed) {
    for (const Window& window : windows_) {
      task.window_begin = window.begin();
      if (window_pre_activation_.defined()) {
        recompute(window);
      }
      over_blocks(window, loops_.gather_gradients);
      over_rows(window, kWideColumns, loops_.grad_activations);
      finish_gradients(window, needed);
    }
  }

  ExpertMlpTask task{};

 private:
  at::Tensor scratch(int64_t bytes) const {
    return on_huge_pages(at::empty({bytes}, options_.dtype(at::kByte)));
  }

  void allocate(ExpertMlpPasses passes) {
    const bool recomputes = passes.forward && passes.backward;
    const int64_t row_bytes =
        loops_.lay_out(task, cut_.task_rows, passes, nullptr) / cut_.task_rows + (recomputes ? kept_row_bytes_ : 0);
    const int64_t fitting = num_threads_ * kWindowBytes / std::max<int64_t>(1, row_bytes);
    const int64_t most = std::max(cut_.task_rows, fitting / cut_.row_unit * cut_.row_unit);
    windows_ = cut_windows(offsets_, num_experts_, most, cut_.task_rows, cut_.row_unit);
    int64_t window_rows = 0;
    for (const Window& window : windows_) {
      window_rows = std::max(window_rows, window.rows);
    }
    window_scratch_ = scratch(loops_.lay_out(task, window_rows, passes, nullptr));
    loops_.lay_out(task, window_rows, passes, static_cast<char*>(window_scratch_.mutable_data_ptr()));
    if (recomputes) {
      window_pre_activation_ = scratch(window_rows * kept_row_bytes_);
    }
    thread_scratch_ = scratch(num_threads_ * cut_.thread_bytes);
  }

  void allocate_carried() {
    const int64_t parameter = 2 * task.hidden_size * task.intermediate_size;
    for (const Window& window : windows_) {
      if (window.begin() > offsets_[window.experts.front().expert] && !carried_.defined()) {
        carried_ = on_huge_pages(at::empty({parameter + parameter / 2}, options_));
        task.carried_gate_up = carried_.mutable_data_ptr();
        task.carried_down = carried_.slice(0, parameter).mutable_data_ptr();
      }
    }
  }

  // The window's part of pre_activation, which tasks look for as if it were whole.
  void recompute(const Window& window) {
    auto* kept = static_cast<char*>(window_pre_activation_.mutable_data_ptr());
    task.pre_activation = kept - window.begin() * kept_row_bytes_;
    over_blocks(window, loops_.gather_tokens);
    over_rows(window, cut_.activation_columns, loops_.activations);
  }

  // Runs task(i, scratch of the thread) for i < count on as many threads as are worth it.
  template <typename Task>
  void run(int64_t count, Task task) {
    std::atomic<int64_t> next{0};
    auto* memory = static_cast<char*>(thread_scratch_.mutable_data_ptr());
    at::parallel_for(0, std::min(num_threads_, count), 1, [&](int64_t begin, int64_t end) {
      const Entered entered(loops_);
      for (int64_t thread = begin; thread < end; ++thread) {
        for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) {
          task(i, memory + thread * cut_.thread_bytes);
        }
      }
    });
  }

  void over_blocks(const Window& window, void (*loop)(const ExpertMlpTask&, ExpertRows, void*)) {
    if (loop != nullptr) {
      run(window.blocks.size(), [&](int64_t i, void* own) { loop(task, window.blocks[i], own); });
    }
  }

  void over_rows(const Window& window, int64_t width, void (*loop)(const ExpertMlpTask&, ExpertRows, Columns, void*)) {
    const int64_t pieces = (task.intermediate_size + width - 1) / width;
    run(window.blocks.size() * pieces, [&](int64_t i, void* own) {
      const int64_t column = i % pieces * width;
      loop(task, window.blocks[i / pieces], {column, std::min(task.intermediate_size, column + width)}, own);
    });
  }

  void finish_gradients(const Window& window, std::array<bool, 4> needed) {
    const auto columns = needed[0] ? cut_columns(task.hidden_size, num_threads_) : std::vector<Columns>();
    const auto gate_up =
        needed[2] ? grad_blocks(window, 2 * task.intermediate_size, task.hidden_size) : std::vector<GradBlock>();
    const auto down =
        needed[3] ? grad_blocks(window, task.hidden_size, task.intermediate_size) : std::vector<GradBlock>();
    const int64_t first_gate_up = columns.size(), first_down = first_gate_up + gate_up.size();
    const int64_t factors = first_down + down.size();
    run(factors + needed[1], [&](int64_t i, void* own) {
      if (i < first_gate_up) {
        loops_.grad_tokens(task, window.experts.data(), window.experts.size(), columns[i], own);
      } else if (i < first_down) {
        loops_.grad_gate_up(task, gate_up[i - first_gate_up], own);
      } else if (i < factors) {
        loops_.grad_down(task, down[i - first_down], own);
      } else {
        loops_.grad_factors(task, window.begin(), window.end());
      }
    });
  }

  std::vector<GradBlock> grad_blocks(const Window& window, int64_t rows, int64_t columns) const {
    std::vector<GradBlock> blocks;
    for (const ExpertRows& expert : window.experts) {
      const bool continues = expert.begin > offsets_[expert.expert], ends = expert.end == offsets_[expert.expert + 1];
      for (int64_t row = 0; row < rows; row += cut_.grad_rows) {
        for (int64_t column = 0; column < columns; column += cut_.grad_columns) {
          blocks.push_back({expert, continues, ends, row, column});
        }
      }
    }
    return blocks;
  }

  const ExpertMlpLoops& loops_;
  int64_t num_experts_;
  const int32_t* offsets_;
  at::TensorOptions options_; // accumulation type
  ExpertMlpCut cut_{};
  int64_t kept_row_bytes_ = 0; // of pre_activation
  int64_t num_threads_;
  std::vector<Window> windows_;
  at::Tensor window_scratch_, window_pre_activation_, carried_, thread_scratch_;
};

at::Tensor zero_sums(const at::Tensor& tokens) {
  return at::zeros(tokens.sizes(), tokens.options().dtype(accumulation_type(tokens.scalar_type())));
}

// `pre_activation` and `rows` are filled where they are defined.
at::Tensor run_forward(
    const Arguments& arguments, const at::Tensor& pre_activation, const at::Tensor& rows, bool with_output = true) {
  const at::Tensor sums = zero_sums(arguments.tokens);
  ExpertMlp experts(arguments, sums, pre_activation, {.forward = true, .backward = false});
  experts.task.rows = rows.defined() ? rows.data_ptr() : nullptr;
  experts.forward(with_output);
  return sums.to(arguments.tokens.scalar_type());
}

// [N, width] in the type of tokens, zeros for sentinels.
at::Tensor empty_rows(const Arguments& arguments, int64_t width) {
  const int64_t num_rows = arguments.order.size(0), used = arguments.num_used();
  at::Tensor rows = on_huge_pages(at::empty({num_rows, width}, arguments.tokens.options()));
  rows.narrow(0, used, num_rows - used).zero_();
  return rows;
}

at::Tensor expert_mlp_cpu(
    const at::Tensor& tokens,
    const at::Tensor& weights,
    const at::Tensor& row_order,
    const at::Tensor& offsets,
    const at::Tensor& gate_up,
    const at::Tensor& down,
    bool /*recompute_activations*/) {
  check_expert_mlp(kOp, tokens, weights, row_order, offsets, gate_up, down);
  check_memory(kOp, tokens, weights, row_order, offsets, gate_up, down);
  return run_forward(dense(kOp, tokens, weights, row_order, offsets, gate_up, down), at::Tensor(), at::Tensor());
}

// ---- Gram matrices: of the outputs before the weights, and of the activations ----

TokenRows token_rows(const Arguments& arguments, const at::Tensor& rows, bool are_gate_and_up) {
  return {
      .rows = rows.const_data_ptr(),
      .rows_stride = rows.size(1),
      .are_gate_and_up = are_gate_and_up,
      .row_of_slot = arguments.row_of_slot.data(),
      .num_used = arguments.num_used(),
      .weights = arguments.factors.const_data_ptr(),
      .top_k = arguments.factors.size(1),
      .width = are_gate_and_up ? rows.size(1) / 2 : rows.size(1)};
}

at::Tensor gram_if(bool is_asked, const Arguments& arguments, const at::Tensor& rows, bool are_gate_and_up) {
  const auto& tokens = arguments.tokens;
  return is_asked
      ? grams_of(token_rows(arguments, rows, are_gate_and_up), storage_of(tokens), tokens.size(0), tokens.options())
      : at::empty({0}, arguments.factors.options());
}

// What the gradients of the Gram matrices make of a backward pass.
struct GramGradients {
  at::Tensor grad_rows; //       [N, H]: all of the gradient of the outputs, the weights in it
  at::Tensor grad_weights; //    [T, K] accumulation type, with grad_rows
  at::Tensor grad_activation; // [N, I] accumulation type
};

GramGradients gradients_of_grams(
    const Arguments& arguments,
    const at::Tensor& grad_output,
    const std::optional<at::Tensor>& grad_output_gram,
    const std::optional<at::Tensor>& grad_activation_gram,
    const at::Tensor& pre_activation,
    const at::Tensor& rows) {
  GramGradients result;
  const at::Tensor& tokens = arguments.tokens;
  const int64_t num_rows = arguments.order.size(0);
  if (grad_output_gram.has_value()) {
    const at::Tensor grad = grad_output_gram->contiguous();
    result.grad_rows = on_huge_pages(at::empty({num_rows, tokens.size(1)}, tokens.options()));
    result.grad_weights = at::empty(arguments.factors.sizes(), arguments.factors.options());
    spread_grams(
        {.tokens = token_rows(arguments, rows, /*are_gate_and_up=*/false),
         .grad_gram = grad.const_data_ptr(),
         .grad_output = grad_output.const_data_ptr(),
         .grad_output_stride = grad_output.stride(0),
         .grad_weights = result.grad_weights.mutable_data_ptr(),
         .grad_rows = result.grad_rows.mutable_data_ptr(),
         .is_accumulated = false},
        storage_of(tokens), tokens.size(0));
  }
  if (grad_activation_gram.has_value()) {
    const at::Tensor grad = grad_activation_gram->contiguous();
    result.grad_activation =
        on_huge_pages(at::empty({num_rows, pre_activation.size(1) / 2}, arguments.factors.options()));
    spread_grams(
        {.tokens = token_rows(arguments, pre_activation, /*are_gate_and_up=*/true),
         .grad_gram = grad.const_data_ptr(),
         .grad_output = nullptr,
         .grad_output_stride = 0,
         .grad_weights = nullptr,
         .grad_rows = result.grad_activation.mutable_data_ptr(),
         .is_accumulated = true},
        storage_of(tokens), tokens.size(0));
  }
  return result;
}

// ---- with gradients ----

ExpertMlpResults expert_mlp_forward_cpu(
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
  check_memory(op, tokens, weights, row_order, offsets, gate_up, down);
  const Arguments arguments = dense(op, tokens, weights, row_order, offsets, gate_up, down);
  const at::Tensor pre_activation = empty_rows(arguments, gate_up.size(1));
  const at::Tensor rows = output_gram ? empty_rows(arguments, tokens.size(1)) : at::Tensor();
  const at::Tensor output = run_forward(arguments, pre_activation, rows);
  return {
      output, pre_activation, output_gram ? rows : at::empty({0}, tokens.options()),
      gram_if(output_gram, arguments, rows, /*are_gate_and_up=*/false),
      gram_if(activation_gram, arguments, pre_activation, /*are_gate_and_up=*/true)};
}

// Gradients that nobody needs are empty.
ExpertMlpGradients expert_mlp_backward_cpu(
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
  check_memory(
      kOp, grad_output, grad_output_gram, grad_activation_gram, tokens, weights, row_order, offsets, gate_up, down,
      pre_activation, rows);
  Arguments arguments = dense(kOp, tokens, weights, row_order, offsets, gate_up, down);
  const at::Tensor grad = with_dense_rows(grad_output);
  at::Tensor kept = dense_if(pre_activation, tokens.scalar_type());
  at::Tensor kept_rows = dense_if(rows, tokens.scalar_type());
  if (!kept.defined() && (grad_output_gram.has_value() || grad_activation_gram.has_value())) {
    // A token's rows lie in several windows.
    kept = empty_rows(arguments, gate_up.size(1));
    kept_rows = grad_output_gram.has_value() ? empty_rows(arguments, tokens.size(1)) : at::Tensor();
    run_forward(arguments, kept, kept_rows, /*with_output=*/kept_rows.defined());
  }
  const GramGradients of_grams =
      gradients_of_grams(arguments, grad, grad_output_gram, grad_activation_gram, kept, kept_rows);
  const bool in_rows = of_grams.grad_rows.defined();
  if (in_rows) { // which the weights are in: what is left of them is who takes part
    arguments.factors = arguments.factors.ne(0).to(arguments.factors.scalar_type());
  }
  const at::Tensor token_sums = needed[0] ? zero_sums(tokens) : at::empty({0}, arguments.factors.options());
  const at::Tensor factors = at::zeros(arguments.factors.sizes(), arguments.factors.options()); // zero for sentinels
  at::Tensor grad_gate_up = on_huge_pages(empty_if(needed[2], gate_up));
  at::Tensor grad_down = on_huge_pages(empty_if(needed[3], down));
  const at::Tensor zeros = at::zeros({tokens.size(1)}, tokens.options());

  ExpertMlp experts(arguments, token_sums, kept, {.forward = !kept.defined(), .backward = true});
  const at::Tensor& grad_rows = in_rows ? of_grams.grad_rows : grad;
  const at::Tensor grad_slots = in_rows ? at::arange(row_order.size(0), row_order.options()) : arguments.order;
  experts.task.grad_output = grad_rows.const_data_ptr();
  experts.task.grad_output_stride = grad_rows.stride(0);
  experts.task.grad_slots = grad_slots.const_data_ptr<int32_t>();
  experts.task.grad_top_k = in_rows ? 1 : weights.size(1);
  experts.task.grad_activation =
      of_grams.grad_activation.defined() ? of_grams.grad_activation.const_data_ptr() : nullptr;
  experts.task.zeros = zeros.const_data_ptr();
  experts.task.grad_factors = factors.mutable_data_ptr();
  experts.task.grad_gate_up = grad_gate_up.mutable_data_ptr();
  experts.task.grad_down = grad_down.mutable_data_ptr();
  experts.backward(needed);
  const at::Tensor& grad_weights = in_rows ? of_grams.grad_weights : factors;
  return {
      token_sums.to(tokens.scalar_type()),
      needed[1] ? grad_weights.to(weights.scalar_type()) : at::empty({0}, weights.options()), grad_gate_up, grad_down};
}

} // namespace
} // namespace edl::cpu

TORCH_LIBRARY_IMPL(edl, CPU, m) {
  m.impl("expert_mlp", edl::cpu::expert_mlp_cpu);
  m.impl("_expert_mlp_forward", edl::cpu::expert_mlp_forward_cpu);
  m.impl("_expert_mlp_forward.waiting", edl::cpu::expert_mlp_forward_cpu);
  m.impl("_expert_mlp_backward", edl::cpu::expert_mlp_backward_cpu);
  m.impl("_expert_mlp_backward.waiting", edl::cpu::expert_mlp_backward_cpu);
}
