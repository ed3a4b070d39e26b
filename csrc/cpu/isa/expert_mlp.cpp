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

#include "cpu/isa/gemm.h"
#include "cpu/isa/simd.h"

namespace edl::cpu::EDL_ISA {
namespace {

constexpr int64_t kGradDepth = 128; // B's panel and the cache lines of A, which a tile reads in part, share L1

// The scratch of a thread.
template <typename Acc>
struct Own {
  explicit Own(void* memory)
      : a(static_cast<Acc*>(memory)), c(a + kBlockRows * kDepth), b(c + kBlockRows * kGradColumns) {}

  Acc* a; // [kBlockRows, kDepth], or its transpose
  Acc* c; // [kBlockRows, kGradColumns] at most
  Acc* b; // panels
};

// Rows of a matrix [T, H] in sorted order.
template <typename Storage>
struct GatheredRows {
  const Storage* data;
  int64_t stride;
  const int32_t* slots;
  int64_t top_k;

  const Storage* operator()(int64_t row) const {
    return data + slots[row] / top_k * stride;
  }
};

// Zero for a factor of 0, whatever x is.
template <typename Acc>
EDL_INLINE Vector<Acc> scaled(Vector<Acc> x, Acc factor) {
  return factor == 0 ? Vector<Acc>{} : x * factor;
}

template <typename Storage>
GatheredRows<Storage> tokens_of(const ExpertMlpTask& task) {
  return {static_cast<const Storage*>(task.tokens), task.tokens_stride, task.slots, task.top_k};
}
template <typename Storage>
GatheredRows<Storage> grad_output_of(const ExpertMlpTask& task) {
  return {static_cast<const Storage*>(task.grad_output), task.grad_output_stride, task.grad_slots, task.grad_top_k};
}

template <typename Storage, typename Acc = Accumulation<Storage>>
Acc factor_of(const ExpertMlpTask& task, int64_t row) {
  return static_cast<const Acc*>(task.factors)[task.slots[row]];
}

// Row of the window's scratch.
template <typename Storage, typename Acc = Accumulation<Storage>>
Acc* activation_of(const ExpertMlpTask& task, int64_t row) {
  return static_cast<Acc*>(task.activation) + (row - task.window_begin) * task.activation_stride;
}
template <typename Storage, typename Acc = Accumulation<Storage>>
Acc* grad_pre_activation_of(const ExpertMlpTask& task, int64_t row) {
  return static_cast<Acc*>(task.grad_pre_activation) + (row - task.window_begin) * task.pre_activation_stride;
}

template <typename Storage>
const Storage* gate_up_of(const ExpertMlpTask& task, int64_t expert, int64_t row) {
  return static_cast<const Storage*>(task.gate_up) + expert * task.gate_up_strides[0] + row * task.gate_up_strides[1];
}
template <typename Storage>
const Storage* down_of(const ExpertMlpTask& task, int64_t expert, int64_t row) {
  return static_cast<const Storage*>(task.down) + expert * task.down_strides[0] + row * task.down_strides[1];
}

// Calls part(begin, count) for pieces of at most `step`; once with nothing where there is nothing, so that products of
// no terms still write their zeros.
template <typename Part>
EDL_INLINE void in_parts(int64_t begin, int64_t end, int64_t step, Part part) {
  do {
    part(begin, std::min(step, end - begin));
    begin += step;
  } while (begin < end);
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

// sums[token] += factor · row, or += row where the factor is in it, for the columns of a task. Each task owns its
// columns: no other adds to them.
template <typename Storage, bool weighted, typename Acc>
void add_to_tokens(
    const ExpertMlpTask& task, int64_t begin, int64_t count, Columns columns, const Acc* rows, int64_t stride) {
  const int64_t width = columns.end - columns.begin;
  for (int64_t i = 0; i < count; ++i, rows += stride) {
    const Acc own = factor_of<Storage>(task, begin + i);
    if (own == 0) {
      continue;
    }
    const Acc factor = weighted ? own : Acc(1);
    Acc* sum = static_cast<Acc*>(task.sums) + task.slots[begin + i] / task.top_k * task.hidden_size + columns.begin;
    int64_t c = 0;
    for (; c + kLanes<Acc> <= width; c += kLanes<Acc>) {
      store(load(sum + c) + load(rows + c) * factor, sum + c);
    }
    for (; c < width; ++c) {
      sum[c] += rows[c] * factor;
    }
  }
}

template <typename Acc, typename To>
void copy_block(const Acc* from, int64_t from_stride, int64_t rows, int64_t columns, To* to, int64_t to_stride) {
  for (int64_t i = 0; i < rows; ++i, from += from_stride, to += to_stride) {
    for (int64_t j = 0; j < columns; j += kLanes<Acc>) {
      store_some<Acc>(load_some<Acc>(from + j, columns - j), columns - j, to + j);
    }
  }
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
      const Vector<Acc> g = load_some<Acc>(gate + j, left), u = load_some<Acc>(gate + intermediate_size + j, left);
      const Vector<Acc> d = load(c + j);
      const Vector<Acc> s = sigmoid_of<Acc>(g);
      const Vector<Acc> silu = g * s;
      const Vector<Acc> slope = s * (1 + g * (1 - s));
      dot += d * silu * u;
      store_some<Acc>(scaled<Acc>(silu * u, factor), left, activation + j);
      if constexpr (with_more) {
        const Vector<Acc> total = d * factor + load_some<Acc>(more + j, left);
        const Acc takes_part = factor == 0 ? Acc(0) : Acc(1);
        store_some<Acc>(scaled<Acc>(total * u * slope, takes_part), left, grad_gate + j);
        store_some<Acc>(scaled<Acc>(total * silu, takes_part), left, grad_gate + intermediate_size + j);
      } else {
        store_some<Acc>(scaled<Acc>(d * u * slope, factor), left, grad_gate + j);
        store_some<Acc>(scaled<Acc>(d * silu, factor), left, grad_gate + intermediate_size + j);
      }
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

template <typename Storage>
void grad_factors(const ExpertMlpTask& task, int64_t begin, int64_t end) {
  using Acc = Accumulation<Storage>;
  for (int64_t row = begin; row < end; ++row) {
    const Acc* dots = static_cast<const Acc*>(task.dots) + row - task.window_begin;
    Acc sum = 0;
    for (int64_t column = 0; column < task.intermediate_size; column += kWideColumns, dots += task.window_rows) {
      sum += *dots;
    }
    static_cast<Acc*>(task.grad_factors)[task.slots[row]] = sum;
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

} // namespace

#define EDL_ALL_STORAGE(loop) {loop<float>, loop<double>, loop<BFloat16>, loop<Float16>}

extern const ExpertMlpLoops expert_mlp_loops = {
    EDL_ALL_STORAGE(activations), EDL_ALL_STORAGE(output),       EDL_ALL_STORAGE(grad_activations),
    EDL_ALL_STORAGE(grad_tokens), EDL_ALL_STORAGE(grad_factors), EDL_ALL_STORAGE(grad_gate_up),
    EDL_ALL_STORAGE(grad_down),
};

} // namespace edl::cpu::EDL_ISA
