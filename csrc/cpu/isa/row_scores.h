#pragma once

// Scores of one row of logits of any length, in a padded buffer whose entries can be taken one by one. No torch header,
// no external linkage.

#include "cpu/isa/simd.h"

namespace edl::cpu::EDL_ISA {
namespace {

enum class Score { softmax, sigmoid };

constexpr int64_t kColumnsOnStack = 1024;

template <typename Acc>
EDL_INLINE Acc sigmoid_sum_epsilon() {
  return static_cast<Acc>(1e-20);
}

template <typename Acc>
struct RowBuffer {
  explicit RowBuffer(int64_t num_experts)
      : padded((num_experts + kLanes<Acc> - 1) / kLanes<Acc> * kLanes<Acc>),
        values(padded <= kColumnsOnStack ? on_stack : new Acc[padded]) {}
  ~RowBuffer() {
    if (values != on_stack) {
      delete[] values;
    }
  }
  RowBuffer(const RowBuffer&) = delete;
  RowBuffer& operator=(const RowBuffer&) = delete;

  alignas(64) Acc on_stack[kColumnsOnStack];
  int64_t padded;
  Acc* values;
};

// Fills the buffer with a row; the padding becomes minus infinity, which every score maps to 0.
template <typename Storage, typename Acc = Accumulation<Storage>>
EDL_INLINE void load_row(const Storage* row, int64_t num_experts, Acc* values) {
  constexpr int64_t lanes = kLanes<Acc>;
  int64_t e = 0;
  for (; e + lanes <= num_experts; e += lanes) {
    store(load(row + e), values + e);
  }
  if (e < num_experts) {
    Acc tail[lanes];
    for (int64_t lane = 0; lane < lanes; ++lane) {
      tail[lane] = e + lane < num_experts ? widen(row[e + lane]) : -std::numeric_limits<Acc>::infinity();
    }
    store(load(tail), values + e);
  }
}

// Writes one row: values[e] of the accumulation type, narrowed.
template <typename Storage, typename Acc = Accumulation<Storage>>
EDL_INLINE void write_row(const Acc* values, int64_t num_experts, Storage* out) {
  constexpr int64_t lanes = kLanes<Acc>;
  int64_t e = 0;
  for (; e + lanes <= num_experts; e += lanes) {
    store(load(values + e), out + e);
  }
  for (; e < num_experts; ++e) {
    narrow(values[e], out + e);
  }
}

// Turns a row of logits into unnormalised scores in place and returns their sum. Padding stays 0.
template <Score score, typename Acc>
EDL_INLINE Acc score_row(Acc* values, int64_t padded) {
  constexpr int64_t lanes = kLanes<Acc>;
  Vector<Acc> total{};
  if constexpr (score == Score::softmax) {
    Vector<Acc> highest = load(values);
    for (int64_t e = lanes; e < padded; e += lanes) {
      highest = maximum<Acc>(highest, load(values + e));
    }
    Acc top = max_of<Acc>(highest);
    for (int64_t e = 0; e < padded; e += lanes) {
      const Vector<Acc> x = exp_of(load(values + e) - top);
      store(x, values + e);
      total += x;
    }
  } else {
    for (int64_t e = 0; e < padded; e += lanes) {
      const Vector<Acc> z = load(values + e);
      const Vector<Acc> decay = exp_of(z < 0 ? z : -z); // exp(-|z|): no overflow on either side
      const Vector<Acc> x = (z < 0 ? decay : broadcast<Acc>(1)) / (1 + decay);
      store(x, values + e);
      total += x;
    }
  }
  return sum_of<Acc>(total);
}

template <Score score, typename Acc>
EDL_INLINE Acc normaliser(Acc sum) {
  return 1 / (score == Score::sigmoid ? sum + sigmoid_sum_epsilon<Acc>() : sum);
}

} // namespace
} // namespace edl::cpu::EDL_ISA
