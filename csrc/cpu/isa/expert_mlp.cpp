// The tasks of expert_mlp (ops/expert_mlp.h), in the accumulation type: float32 for 16-bit storage too.
//
//   activations   P = X gate_up^T, A = silu(gate) * up           4·H·I operations per row
//   output        output[token] += factor · A down^T             2·H·I
//   grad_activations  dA = dO down, dP = factor · dA · dA/dP         2·H·I
//   grad_tokens   dX[token] += dP gate_up                        4·H·I
//   grad_gate_up  dP^T X per expert                              4·H·I
//   grad_down     dO^T (factor · A) per expert                   2·H·I
//
// X and dO are the tokens' rows of tokens and of grad_output, gathered while they are packed. Parameters are packed
// once per task; A and dP lie in the scratch of the window.
//
// A row whose factor is 0 takes no part, whatever it holds: nothing is added of it, its factor · A and dP are zeros, and
// X is replaced by zeros beside dP. Only the gradient of the factor reads it.
#include "cpu/isa/expert_mlp.h"

#include "cpu/isa/expert_mlp_rows.h"
#include "cpu/isa/gemm.h"
#include "cpu/isa/simd.h"

namespace edl::cpu::EDL_ISA {
namespace {

constexpr int64_t kDepth = 256; //             k of one pass over a block
constexpr int64_t kBlockRows = 84; //          rows of A: whole tiles of 6 and of 14 rows
constexpr int64_t kActivationColumns = 64; //  columns of I of a task that computes gate and up; all are whole panels
constexpr int64_t kGradColumns = 256; //       columns of a task over a parameter's gradient, of kBlockRows rows
constexpr int64_t kGradDepth = 128; //         B's panel and the cache lines of A, which a tile reads in part, share L1
constexpr int64_t kTaskRows = 512;
constexpr int64_t kRowPadding = 16; //         rows a power of two apart would share cache sets

// The scratch of a thread.
template <typename Acc>
struct Own {
  explicit Own(void* memory)
      : a(static_cast<Acc*>(memory)), c(a + kBlockRows * kDepth), b(c + kBlockRows * kGradColumns) {}

  Acc* a; // [kBlockRows, kDepth], or its transpose
  Acc* c; // [kBlockRows, kGradColumns] at most
  Acc* b; // panels
};

// Row of the window's scratch.
template <typename Storage, typename Acc = Accumulation<Storage>>
Acc* activation_of(const ExpertMlpTask& task, int64_t row) {
  return static_cast<Acc*>(task.activation) + (row - task.window_begin) * task.activation_stride;
}
template <typename Storage, typename Acc = Accumulation<Storage>>
Acc* grad_pre_activation_of(const ExpertMlpTask& task, int64_t row) {
  return static_cast<Acc*>(task.grad_pre_activation) + (row - task.window_begin) * task.pre_activation_stride;
}

// ---- products ----

// own.c [count, columns] = rows begin.. of a gathered matrix, times the panels in own.b.
template <typename Storage, typename Acc>
void multiply_gathered(
    GatheredRows<Storage> rows, int64_t begin, int64_t count, int64_t depth, int64_t columns, Own<Acc> own) {
  in_parts(0, depth, kDepth, [&](int64_t k, int64_t part) {
    for (int64_t i = 0; i < count; ++i) {
      copy_row(rows(begin + i) + k, part, own.a + i * kDepth);
    }
    multiply(Left<Layout::rows, Acc>{own.a, kDepth}, own.b + k * columns, count, columns, part, own.c, columns, k > 0);
  });
}

// own.c [count, columns] = rows of scratch, times the panels in own.b.
template <typename Acc>
void multiply_scratch(const Acc* rows, int64_t stride, int64_t count, int64_t depth, int64_t columns, Own<Acc> own) {
  in_parts(0, depth, kDepth, [&](int64_t k, int64_t part) {
    multiply(
        Left<Layout::rows, Acc>{rows + k, stride}, own.b + k * columns, count, columns, part, own.c, columns, k > 0);
  });
}

// ---- forward ----

// From own.c: gate in the first half of the columns, up in the second.
template <typename Storage, typename Acc>
void activate(const ExpertMlpTask& task, int64_t begin, int64_t count, Columns columns, int64_t half, const Acc* c) {
  const int64_t width = columns.end - columns.begin;
  for (int64_t i = 0; i < count; ++i, c += 2 * half) {
    auto* kept = static_cast<Storage*>(task.pre_activation);
    Storage* gate = kept ? kept + (begin + i) * 2 * task.intermediate_size + columns.begin : nullptr;
    Acc* activation = activation_of<Storage>(task, begin + i) + columns.begin;
    for (int64_t j = 0; j < width; j += kLanes<Acc>) {
      const Vector<Acc> g = load(c + j), u = load(c + half + j);
      store_some<Acc>(g * sigmoid_of<Acc>(g) * u, width - j, activation + j);
      if (gate != nullptr) {
        store_some<Acc>(g, width - j, gate + j);
        store_some<Acc>(u, width - j, gate + task.intermediate_size + j);
      }
    }
  }
}

template <typename Storage>
void activations(const ExpertMlpTask& task, ExpertRows rows, Columns columns, void* memory) {
  using Acc = Accumulation<Storage>;
  const Own<Acc> own(memory);
  const int64_t width = columns.end - columns.begin, half = round_up(width, kTileColumns<Acc>);
  const int64_t stride = task.gate_up_strides[1];
  const Storage* gate = gate_up_of<Storage>(task, rows.expert, columns.begin);
  const Storage* up = gate_up_of<Storage>(task, rows.expert, task.intermediate_size + columns.begin);
  in_parts(0, task.hidden_size, kDepth, [&](int64_t k, int64_t part) {
    Acc* panels = own.b + k * 2 * half;
    pack_transposed(gate + k, stride, part, width, panels);
    pack_transposed(up + k, stride, part, width, panels + part * half);
  });
  in_parts(rows.begin, rows.end, kBlockRows, [&](int64_t begin, int64_t count) {
    multiply_gathered(tokens_of<Storage>(task), begin, count, task.hidden_size, 2 * half, own);
    activate<Storage>(task, begin, count, columns, half, own.c);
  });
}

template <typename Storage>
void output(const ExpertMlpTask& task, const ExpertRows* experts, int64_t num_experts, Columns columns, void* memory) {
  using Acc = Accumulation<Storage>;
  const Own<Acc> own(memory);
  const int64_t width = columns.end - columns.begin, padded = round_up(width, kTileColumns<Acc>);
  for (const ExpertRows* rows = experts; rows != experts + num_experts; ++rows) {
    const Storage* down = down_of<Storage>(task, rows->expert, columns.begin);
    in_parts(0, task.intermediate_size, kDepth, [&](int64_t k, int64_t part) {
      pack_transposed(down + k, task.down_strides[1], part, width, own.b + k * padded);
    });
    in_parts(rows->begin, rows->end, kBlockRows, [&](int64_t begin, int64_t count) {
      const Acc* activation = activation_of<Storage>(task, begin);
      multiply_scratch(activation, task.activation_stride, count, task.intermediate_size, padded, own);
      if (task.rows != nullptr) {
        auto* kept = static_cast<Storage*>(task.rows) + begin * task.hidden_size + columns.begin;
        copy_block(own.c, padded, count, width, kept, task.hidden_size);
      }
      add_to_tokens<Storage, true>(task, begin, count, columns, own.c, padded);
    });
  }
}

// ---- backward ----

// From own.c: the gradient of the activation before its factor.
template <typename Storage, bool with_more, typename Acc>
void activate_backward(
    const ExpertMlpTask& task, int64_t begin, int64_t count, Columns columns, int64_t stride, const Acc* c) {
  const int64_t width = columns.end - columns.begin, intermediate_size = task.intermediate_size;
  Acc* dots = static_cast<Acc*>(task.dots) + columns.begin / kWideColumns * task.window_rows;
  for (int64_t row = begin; row < begin + count; ++row, c += stride) {
    const auto* gate = static_cast<const Storage*>(task.pre_activation) + row * 2 * intermediate_size + columns.begin;
    const Acc* more =
        with_more ? static_cast<const Acc*>(task.grad_activation) + row * intermediate_size + columns.begin : nullptr;
    Acc* activation = activation_of<Storage>(task, row) + columns.begin;
    Acc* grad_gate = grad_pre_activation_of<Storage>(task, row) + columns.begin;
    const Acc factor = factor_of<Storage>(task, row);
    Vector<Acc> dot{};
    for (int64_t j = 0; j < width; j += kLanes<Acc>) {
      const int64_t left = width - j;
      const ActivationGradients<Acc> grads = activation_gradients<with_more, Acc>(
          load_some<Acc>(gate + j, left), load_some<Acc>(gate + intermediate_size + j, left),
          load_some<Acc>(c + j, left), // behind I infinity has met zeros
          with_more ? load_some<Acc>(more + j, left) : Vector<Acc>{}, factor, dot);
      store_some<Acc>(grads.activation, left, activation + j);
      store_some<Acc>(grads.gate, left, grad_gate + j);
      store_some<Acc>(grads.up, left, grad_gate + intermediate_size + j);
    }
    dots[row - task.window_begin] = sum_of<Acc>(dot);
  }
}

template <typename Storage>
void grad_activations(const ExpertMlpTask& task, ExpertRows rows, Columns columns, void* memory) {
  using Acc = Accumulation<Storage>;
  const Own<Acc> own(memory);
  const int64_t width = columns.end - columns.begin, padded = round_up(width, kTileColumns<Acc>);
  in_parts(0, task.hidden_size, kDepth, [&](int64_t k, int64_t part) {
    const auto row = [&](int64_t h) { return down_of<Storage>(task, rows.expert, k + h) + columns.begin; };
    pack_panels(row, part, width, own.b + k * padded);
  });
  in_parts(rows.begin, rows.end, kBlockRows, [&](int64_t begin, int64_t count) {
    multiply_gathered(grad_output_of<Storage>(task), begin, count, task.hidden_size, padded, own);
    if (task.grad_activation == nullptr) {
      activate_backward<Storage, false>(task, begin, count, columns, padded, own.c);
    } else {
      activate_backward<Storage, true>(task, begin, count, columns, padded, own.c);
    }
  });
}

template <typename Storage>
void grad_tokens(
    const ExpertMlpTask& task, const ExpertRows* experts, int64_t num_experts, Columns columns, void* memory) {
  using Acc = Accumulation<Storage>;
  const Own<Acc> own(memory);
  const int64_t width = columns.end - columns.begin, padded = round_up(width, kTileColumns<Acc>);
  const int64_t depth = 2 * task.intermediate_size;
  for (const ExpertRows* rows = experts; rows != experts + num_experts; ++rows) {
    in_parts(0, depth, kDepth, [&](int64_t k, int64_t part) {
      const auto row = [&](int64_t j) { return gate_up_of<Storage>(task, rows->expert, k + j) + columns.begin; };
      pack_panels(row, part, width, own.b + k * padded);
    });
    in_parts(rows->begin, rows->end, kBlockRows, [&](int64_t begin, int64_t count) {
      const Acc* grad = grad_pre_activation_of<Storage>(task, begin);
      multiply_scratch(grad, task.pre_activation_stride, count, depth, padded, own);
      add_to_tokens<Storage, false>(task, begin, count, columns, own.c, padded);
    });
  }
}

// c [rows, columns] = or += the sum over the rows r of an expert of left(r)^T right(r).
template <typename LeftRow, typename RightRow, typename Acc>
void multiply_outer(
    ExpertRows range,
    LeftRow left,
    int64_t rows,
    RightRow right,
    int64_t columns,
    Acc* c,
    int64_t stride,
    bool accumulate,
    Own<Acc> own) {
  in_parts(range.begin, range.end, kGradDepth, [&](int64_t begin, int64_t part) {
    for (int64_t i = 0; i < part; ++i) {
      copy_row(left(begin + i), rows, own.a + i * kBlockRows);
    }
    pack_panels([&](int64_t k) { return right(begin + k); }, part, columns, own.b);
    const bool first = begin == range.begin && !accumulate;
    multiply(Left<Layout::columns, Acc>{own.a, kBlockRows}, own.b, rows, columns, part, c, stride, !first);
  });
}

// A block of the gradient [M, N] of one expert: summed in place, or, for 16-bit storage, beside it.
template <typename Storage, typename LeftRow, typename RightRow, typename Acc = Accumulation<Storage>>
void grad_block(
    const GradBlock& block,
    LeftRow left,
    int64_t m,
    RightRow right,
    int64_t n,
    Storage* grad,
    Acc* carried,
    void* memory) {
  const Own<Acc> own(memory);
  const int64_t rows = std::min(kBlockRows, m - block.row), columns = std::min(kGradColumns, n - block.column);
  const int64_t place = block.row * n + block.column;
  if constexpr (std::is_same_v<Storage, Acc>) {
    multiply_outer(block.rows, left, rows, right, columns, grad + place, n, block.continues, own);
  } else {
    if (block.continues) {
      copy_block(carried + place, n, rows, columns, own.c, kGradColumns);
    }
    multiply_outer(block.rows, left, rows, right, columns, own.c, kGradColumns, block.continues, own);
    if (block.ends) {
      copy_block(own.c, kGradColumns, rows, columns, grad + place, n);
    } else {
      copy_block(own.c, kGradColumns, rows, columns, carried + place, n);
    }
  }
}

template <typename Storage>
void grad_gate_up(const ExpertMlpTask& task, const GradBlock& block, void* memory) {
  using Acc = Accumulation<Storage>;
  const auto tokens = tokens_of<Storage>(task);
  const auto* zeros = static_cast<const Storage*>(task.zeros);
  const int64_t m = 2 * task.intermediate_size, n = task.hidden_size;
  grad_block<Storage>(
      block, [&](int64_t row) { return grad_pre_activation_of<Storage>(task, row) + block.row; }, m,
      [&](int64_t row) { return (factor_of<Storage>(task, row) == 0 ? zeros : tokens(row)) + block.column; }, n,
      static_cast<Storage*>(task.grad_gate_up) + block.rows.expert * m * n, static_cast<Acc*>(task.carried_gate_up),
      memory);
}

template <typename Storage>
void grad_down(const ExpertMlpTask& task, const GradBlock& block, void* memory) {
  using Acc = Accumulation<Storage>;
  const auto grad_output = grad_output_of<Storage>(task);
  const int64_t m = task.hidden_size, n = task.intermediate_size;
  grad_block<Storage>(
      block, [&](int64_t row) { return grad_output(row) + block.row; }, m,
      [&](int64_t row) { return activation_of<Storage>(task, row) + block.column; }, n,
      static_cast<Storage*>(task.grad_down) + block.rows.expert * m * n, static_cast<Acc*>(task.carried_down), memory);
}

// ---- cuts and scratch ----

template <typename Storage>
ExpertMlpCut cut(int64_t hidden_size, int64_t intermediate_size) {
  const int64_t longest = std::max({hidden_size, intermediate_size, kDepth});
  const int64_t elements = kBlockRows * (kDepth + kGradColumns) + kGradColumns * longest;
  return {
      .row_unit = 1,
      .task_rows = kTaskRows,
      .activation_columns = kActivationColumns,
      .grad_rows = kBlockRows,
      .grad_columns = kGradColumns,
      .thread_bytes =
          (round_up(elements, kRowPadding) + kRowPadding) * static_cast<int64_t>(sizeof(Accumulation<Storage>))};
}

template <typename Storage>
size_t lay_out(ExpertMlpTask& task, int64_t window_rows, ExpertMlpPasses passes, char* memory) {
  using Acc = Accumulation<Storage>;
  Scratch scratch(memory);
  task.window_rows = window_rows;
  task.activation_stride = round_up(task.intermediate_size, kRowPadding) + kRowPadding;
  task.activation = scratch.take<Acc>(window_rows * task.activation_stride);
  if (passes.backward) {
    task.pre_activation_stride = round_up(2 * task.intermediate_size, kRowPadding) + kRowPadding;
    task.grad_pre_activation = scratch.take<Acc>(window_rows * task.pre_activation_stride);
    task.dots = scratch.take<Acc>(round_up(task.intermediate_size, kWideColumns) / kWideColumns * window_rows);
  }
  return scratch.bytes();
}

template <typename Storage>
constexpr ExpertMlpLoops loops_of() {
  return {
      .cut = cut<Storage>,
      .lay_out = lay_out<Storage>,
      .enter = nullptr,
      .leave = nullptr,
      .gather_tokens = nullptr,
      .activations = activations<Storage>,
      .output = output<Storage>,
      .gather_gradients = nullptr,
      .grad_activations = grad_activations<Storage>,
      .grad_tokens = grad_tokens<Storage>,
      .grad_factors = grad_factors<Storage>,
      .grad_gate_up = grad_gate_up<Storage>,
      .grad_down = grad_down<Storage>};
}

} // namespace

extern const ExpertMlpTable expert_mlp_loops = {
    {loops_of<float>(), loops_of<double>(), loops_of<BFloat16>(), loops_of<Float16>()}};

} // namespace edl::cpu::EDL_ISA
