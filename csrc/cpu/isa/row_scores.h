#pragma once

// The scores of one row of logits of any length, not normalised, and their slopes: the formula of every score function.
// No torch header, no external linkage.

#include <type_traits>
#include <utility>

#include "common/score_function.h"
#include "cpu/isa/simd.h"

namespace edl::cpu::EDL_ISA {
namespace {

// loop<Storage, score> for every score function of a router, as entries of a table.
#define EDL_SCORE_LOOP(score, loop, Storage) loop<Storage, Scores::score>,
#define EDL_SCORE_LOOPS(loop, Storage) EDL_ROUTER_SCORES(EDL_SCORE_LOOP, loop, Storage)

// ---- the formulas ----

// Turns `count` vectors of logits into scores; `top`, one number or a vector, is the highest of their row, or of that of
// each lane. Padding, minus infinity, becomes 0.
template <Scores score, int count, typename Acc, typename Number = Acc>
EDL_INLINE void score_vectors(Number top, Vector<Acc>* x) {
  if constexpr (score == Scores::softmax) {
    for (int i = 0; i < count; ++i) {
      x[i] += -top;
    }
    exp_each<count>(x);
  } else {
    static_assert(score == Scores::sigmoid);
    sigmoid_each<count, Acc>(x);
  }
}

// d score / d logit, of numbers or vectors.
template <Scores score, typename Number>
EDL_INLINE Number slope_of(Number x) {
  if constexpr (score == Scores::softmax) {
    return x;
  } else {
    static_assert(score == Scores::sigmoid);
    return x * (1 - x);
  }
}

// What makes a distribution of scores, by the sum of a row, or of that of each lane.
template <Scores score, typename Acc, typename Number = Acc>
EDL_INLINE Number normaliser(Number sum) {
  return 1 / (is_share_of_row(score) ? sum : sum + static_cast<Acc>(kScoreSumEpsilon));
}

// ---- rows of E entries, by vectors: `fixed` > 0 of them, where the compiler may know it, or one of these ----

constexpr int64_t kAnyLength = 0;
constexpr int64_t kWholeVectors = -1; // any number of them, and no entries beside

// Calls body(v) for every vector of a row; written out where their number is known.
template <int64_t fixed, typename Body>
EDL_INLINE void for_vectors(int64_t count, Body body) {
  if constexpr (fixed > 0) {
    [&]<int64_t... v>(std::integer_sequence<int64_t, v...>) {
      (body(v), ...);
    }(std::make_integer_sequence<int64_t, fixed>{});
  } else {
    for (int64_t v = 0; v < count; ++v) {
      body(v);
    }
  }
}

// A vector that reaches past the end of its row of E entries; `beyond` stands for what is not there.
template <typename Storage, typename Acc = Accumulation<Storage>>
__attribute__((noinline)) Vector<Acc> load_part(const Storage* data, int64_t entries, Acc beyond) {
  Acc lanes[kLanes<Acc>];
  for (int64_t lane = 0; lane < kLanes<Acc>; ++lane) {
    lanes[lane] = lane < entries ? widen(data[lane]) : beyond;
  }
  return load(lanes);
}

// Of a row of E entries, which fill every vector unless it is of any length.
template <int64_t fixed, typename Storage, typename Acc = Accumulation<Storage>>
EDL_INLINE Vector<Acc> load_vector(const Storage* data, int64_t v, int64_t num_experts, Acc beyond) {
  constexpr int64_t lanes = kLanes<Acc>;
  if (fixed != kAnyLength || (v + 1) * lanes <= num_experts) {
    return load(data + v * lanes);
  }
  return load_part(data + v * lanes, num_experts - v * lanes, beyond);
}

// The highest logit of a row, where the score wants it. It is looked for one row ahead: a row's exponentials would else
// wait for it.
template <Scores score, int64_t fixed, typename Storage, typename Acc = Accumulation<Storage>>
EDL_INLINE Acc top_of(const Storage* row, int64_t num_experts) {
  if constexpr (is_share_of_row(score)) {
    constexpr Acc beyond = -std::numeric_limits<Acc>::infinity();
    constexpr int64_t lanes = kLanes<Acc>;
    Vector<Acc> highest = load_vector<fixed>(row, 0, num_experts, beyond);
    for_vectors<fixed>((num_experts + lanes - 1) / lanes, [&](int64_t v) {
      highest = maximum<Acc>(highest, load_vector<fixed>(row, v, num_experts, beyond));
    });
    return max_of<Acc>(highest);
  } else {
    return 0;
  }
}

// Calls take(v, scores) for every vector of a row of logits, and returns the sum of the scores.
template <Scores score, int64_t fixed, typename Storage, typename Acc = Accumulation<Storage>, typename Take>
EDL_INLINE Acc for_scores(const Storage* logits, int64_t num_experts, Acc top, Take take) {
  constexpr Acc beyond = -std::numeric_limits<Acc>::infinity();
  constexpr int together = fixed == kWholeVectors ? 1 : fixed == kAnyLength || fixed > 4 ? 4 : static_cast<int>(fixed);
  const int64_t vectors = fixed > 0 ? fixed : (num_experts + kLanes<Acc> - 1) / kLanes<Acc>;
  Vector<Acc> total{};
  const auto score_some = [&]<int count>(int64_t first, std::integral_constant<int, count>) {
    Vector<Acc> x[count];
    for_vectors<count>(count, [&](int64_t i) { x[i] = load_vector<fixed>(logits, first + i, num_experts, beyond); });
    score_vectors<score, count, Acc>(top, x);
    for_vectors<count>(count, [&](int64_t i) {
      take(first + i, x[i]);
      total += x[i];
    });
  };
  const int64_t whole = vectors / together;
  for_vectors<fixed / together>(
      whole, [&](int64_t i) { score_some(i * together, std::integral_constant<int, together>{}); });
  for (int64_t v = whole * together; v < vectors; ++v) {
    score_some(v, std::integral_constant<int, 1>{});
  }
  return sum_of<Acc>(total);
}

// ---- rows in a padded buffer, whose entries can be taken one by one ----

constexpr int64_t kColumnsOnStack = 1024;

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

// Turns a row of logits into scores in place, and returns their sum.
template <Scores score, typename Acc>
EDL_INLINE Acc score_row(Acc* values, int64_t padded) {
  const Acc top = top_of<score, kWholeVectors>(values, padded);
  return for_scores<score, kWholeVectors>(
      values, padded, top, [&](int64_t v, Vector<Acc> x) { store(x, values + v * kLanes<Acc>); });
}

} // namespace
} // namespace edl::cpu::EDL_ISA
