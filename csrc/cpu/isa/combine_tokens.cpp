// Inner loops of combine_tokens: sums in float32 (float64 for float64), a block of columns at a time, so that a block's
// sums stay in registers over a token's rows. Cost: one read of the rows, one write of the tokens.
#include "cpu/isa/combine_tokens.h"

#include "cpu/isa/simd.h"

namespace edl::cpu::EDL_ISA {
namespace {

constexpr int64_t kBlock = 4; // vectors

// output[column .. column + vectors * lanes) of token t.
template <typename Storage, int64_t vectors, typename Acc = Accumulation<Storage>>
EDL_INLINE void combine_block(const CombineTask& task, int64_t t, int64_t column) {
  constexpr int64_t lanes = kLanes<Acc>;
  Vector<Acc> sum[vectors] = {};
  for (int64_t slot = t * task.top_k; slot < (t + 1) * task.top_k; ++slot) {
    const Acc weight = static_cast<const Acc*>(task.weights)[slot];
    if (weight != 0) {
      const auto* row = static_cast<const Storage*>(task.rows) + task.row_of_slot[slot] * task.rows_stride + column;
      for (int64_t v = 0; v < vectors; ++v) {
        sum[v] += load(row + v * lanes) * weight;
      }
    }
  }
  auto* out = static_cast<Storage*>(task.output) + t * task.width + column;
  for (int64_t v = 0; v < vectors; ++v) {
    store(sum[v], out + v * lanes);
  }
}

template <typename Storage, typename Acc = Accumulation<Storage>>
EDL_INLINE void combine_column(const CombineTask& task, int64_t t, int64_t column) {
  Acc sum = 0;
  for (int64_t slot = t * task.top_k; slot < (t + 1) * task.top_k; ++slot) {
    const Acc weight = static_cast<const Acc*>(task.weights)[slot];
    if (weight != 0) {
      sum += widen(static_cast<const Storage*>(task.rows)[task.row_of_slot[slot] * task.rows_stride + column]) * weight;
    }
  }
  narrow(sum, static_cast<Storage*>(task.output) + t * task.width + column);
}

template <typename Storage>
void combine(const CombineTask& task, int64_t begin, int64_t end) {
  constexpr int64_t lanes = kLanes<Accumulation<Storage>>;
  for (int64_t t = begin; t < end; ++t) {
    int64_t column = 0;
    for (; column + kBlock * lanes <= task.width; column += kBlock * lanes) {
      combine_block<Storage, kBlock>(task, t, column);
    }
    for (; column + lanes <= task.width; column += lanes) {
      combine_block<Storage, 1>(task, t, column);
    }
    for (; column < task.width; ++column) {
      combine_column<Storage>(task, t, column);
    }
  }
}

template <typename Storage, typename Acc = Accumulation<Storage>>
EDL_INLINE void scale_row(const Storage* row, Acc weight, int64_t width, Storage* out) {
  int64_t column = 0;
  for (; column + kLanes<Acc> <= width; column += kLanes<Acc>) {
    store(load(row + column) * weight, out + column);
  }
  for (; column < width; ++column) {
    narrow(widen(row[column]) * weight, out + column);
  }
}

template <typename Storage, typename Acc = Accumulation<Storage>>
EDL_INLINE Acc dot_rows(const Storage* a, const Storage* b, int64_t width) {
  Vector<Acc> sums{};
  int64_t column = 0;
  for (; column + kLanes<Acc> <= width; column += kLanes<Acc>) {
    sums += load(a + column) * load(b + column);
  }
  Acc sum = sum_of<Acc>(sums);
  for (; column < width; ++column) {
    sum += widen(a[column]) * widen(b[column]);
  }
  return sum;
}

template <typename Storage>
void spread(const CombineGradient& task, int64_t begin, int64_t end) {
  using Acc = Accumulation<Storage>;
  const auto* weights = static_cast<const Acc*>(task.weights);
  for (int64_t t = begin; t < end; ++t) {
    const auto* grad = static_cast<const Storage*>(task.grad_output) + t * task.grad_output_stride;
    for (int64_t slot = t * task.top_k; slot < (t + 1) * task.top_k; ++slot) {
      const int64_t row = task.row_of_slot[slot];
      if (task.grad_rows != nullptr) {
        scale_row(grad, weights[slot], task.width, static_cast<Storage*>(task.grad_rows) + row * task.width);
      }
      if (task.grad_weights != nullptr) {
        const auto* values = static_cast<const Storage*>(task.rows) + row * task.rows_stride;
        static_cast<Acc*>(task.grad_weights)[slot] = dot_rows(grad, values, task.width);
      }
    }
  }
}

} // namespace

extern const CombineTokensLoops combine_tokens_loops = {
    {combine<float>, combine<double>, combine<BFloat16>, combine<Float16>},
    {spread<float>, spread<double>, spread<BFloat16>, spread<Float16>},
};

} // namespace edl::cpu::EDL_ISA
