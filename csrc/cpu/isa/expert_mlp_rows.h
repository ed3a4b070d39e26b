#pragma once

// What the loops of expert_mlp share, whatever multiplies: where rows, parameters and factors stand, and how rows are
// added to their tokens. No external linkage.

#include <algorithm>

#include "cpu/isa/expert_mlp.h"
#include "cpu/isa/simd.h"

namespace edl::cpu::EDL_ISA {
namespace {

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

template <typename Storage>
const Storage* gate_up_of(const ExpertMlpTask& task, int64_t expert, int64_t row) {
  return static_cast<const Storage*>(task.gate_up) + expert * task.gate_up_strides[0] + row * task.gate_up_strides[1];
}
template <typename Storage>
const Storage* down_of(const ExpertMlpTask& task, int64_t expert, int64_t row) {
  return static_cast<const Storage*>(task.down) + expert * task.down_strides[0] + row * task.down_strides[1];
}

// Zero for a factor of 0, whatever x is.
template <typename Acc>
EDL_INLINE Vector<Acc> scaled(Vector<Acc> x, Acc factor) {
  return factor == 0 ? Vector<Acc>{} : x * factor;
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

// The gradients of a row's activation: of gate and up, and the activation times its factor, before any rounding.
template <typename Acc>
struct ActivationGradients {
  Vector<Acc> gate;
  Vector<Acc> up;
  Vector<Acc> activation;
};

// `d` is the gradient of the activation before its factor, `more` what is added behind it. Adds d · activation to `dot`.
template <bool with_more, typename Acc>
EDL_INLINE ActivationGradients<Acc> activation_gradients(
    Vector<Acc> gate, Vector<Acc> up, Vector<Acc> d, Vector<Acc> more, Acc factor, Vector<Acc>& dot) {
  const Vector<Acc> s = sigmoid_of<Acc>(gate);
  const Vector<Acc> silu = gate * s;
  const Vector<Acc> slope = s * (1 + gate * (1 - s));
  dot += d * silu * up;
  const Vector<Acc> activation = scaled<Acc>(silu * up, factor);
  if constexpr (with_more) {
    const Vector<Acc> total = d * factor + more;
    const Acc takes_part = factor == 0 ? Acc(0) : Acc(1);
    return {scaled<Acc>(total * up * slope, takes_part), scaled<Acc>(total * silu, takes_part), activation};
  } else {
    return {scaled<Acc>(d * up * slope, factor), scaled<Acc>(d * silu, factor), activation};
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

// ---- scratch ----

// Hands out memory piece by piece, each aligned to 64 bytes; without memory it only counts.
class Scratch {
 public:
  explicit Scratch(char* memory) : memory_(memory) {}

  template <typename Scalar>
  Scalar* take(int64_t count) {
    char* place = memory_ == nullptr ? nullptr : memory_ + bytes_;
    bytes_ += (static_cast<size_t>(count) * sizeof(Scalar) + 63) / 64 * 64;
    return reinterpret_cast<Scalar*>(place);
  }

  size_t bytes() const {
    return bytes_;
  }

 private:
  char* memory_;
  size_t bytes_ = 0;
};

} // namespace
} // namespace edl::cpu::EDL_ISA
