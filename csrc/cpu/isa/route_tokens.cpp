// Inner loops of route_tokens: logits [T, E] in float32, float64, bfloat16 or float16, everything computed in float32
// (float64 for float64). Cost: one read of the logits, K scans of a row in cache; the scores of a whole row are formed
// only where its choice or its weights need them. Logits that are not allowed become -inf in the thread's own row.
#include "cpu/isa/route_tokens.h"

#include "cpu/isa/row_scores.h"
#include "cpu/isa/simd.h"

namespace edl::cpu::EDL_ISA {
namespace {

// ---- the choice: values become integers of the same order, so that "already taken" is lower than any value ----

template <typename Acc>
struct KeyOf {
  using type = int32_t;
};
template <>
struct KeyOf<double> {
  using type = int64_t;
};
template <typename Acc>
using Key = typename KeyOf<Acc>::type;

template <typename Integer>
inline constexpr Integer kLowest = std::numeric_limits<Integer>::min();

template <typename Integer>
EDL_INLINE Vector<Integer> load_keys(const Integer* data) {
  Vector<Integer> x;
  std::memcpy(&x, data, sizeof(x));
  return x;
}
template <typename Integer>
EDL_INLINE void store_keys(Vector<Integer> x, Integer* out) {
  std::memcpy(out, &x, sizeof(x));
}

// The order of the values; -0 equals 0, NaN is highest.
template <typename Acc>
EDL_INLINE Vector<Key<Acc>> key_of(Vector<Acc> x) {
  using Integer = Key<Acc>;
  constexpr Integer highest = std::numeric_limits<Integer>::max();
  const Vector<Acc> positive_zero = x + Acc(0);
  Vector<Integer> bits;
  std::memcpy(&bits, &positive_zero, sizeof(bits));
  bits ^= (bits >> (8 * sizeof(Integer) - 1)) & highest;
  return x != x ? broadcast<Integer>(highest) : bits;
}

// Of an expert that is not allowed, and of one that is masked with -inf: below every value, above "already taken".
template <typename Integer>
inline constexpr Integer kForbidden = kLowest<Integer> + 1;
template <typename Integer>
inline constexpr Integer kClosed = kForbidden<Integer> + 1;

template <typename Value>
EDL_INLINE void fill_forbidden(const uint8_t* allowed, int64_t num_experts, Value value, Value* values) {
  for (int64_t e = 0; e < num_experts; ++e) {
    values[e] = allowed[e] != 0 ? values[e] : value;
  }
}

// Takes the first of the highest keys, `top_k` times. `keys` is padded with kLowest.
template <typename Integer>
EDL_INLINE void take_highest(Integer* keys, int64_t padded, int64_t top_k, int64_t* chosen) {
  constexpr int64_t lanes = kLanes<Integer>;
  for (int64_t k = 0; k < top_k; ++k) {
    Vector<Integer> best = load_keys(keys);
    Vector<Integer> block{};
    for (int64_t v = 1; v < padded / lanes; ++v) {
      const Vector<Integer> x = load_keys(keys + v * lanes);
      const auto higher = x > best;
      best = higher ? x : best;
      block = higher ? broadcast<Integer>(static_cast<Integer>(v)) : block;
    }
    Integer lane_best[lanes];
    Integer lane_block[lanes];
    store_keys<Integer>(best, lane_best);
    store_keys<Integer>(block, lane_block);
    int64_t winner = 0;
    for (int64_t lane = 1; lane < lanes; ++lane) {
      const bool higher = lane_best[lane] > lane_best[winner];
      const bool earlier = lane_best[lane] == lane_best[winner] && lane_block[lane] < lane_block[winner];
      winner = higher || earlier ? lane : winner;
    }
    chosen[k] = lane_block[winner] * lanes + winner;
    keys[chosen[k]] = kLowest<Integer>;
  }
}

// The buffers of one thread.
template <typename Acc>
struct RouteScratch {
  RouteScratch(int64_t num_experts, int64_t top_k)
      : row(num_experts), scores(num_experts), bias(num_experts), keys(num_experts), few(top_k) {}
  RowBuffer<Acc> row; //       logits
  RowBuffer<Acc> scores; //    unnormalised, of the whole row, where needed
  RowBuffer<Acc> bias;
  RowBuffer<Key<Acc>> keys;
  RowBuffer<Acc> few; //       the chosen ones
};

template <typename Acc>
EDL_INLINE void fill_keys_with_logits(RouteScratch<Acc>* scratch) {
  for (int64_t e = 0; e < scratch->row.padded; e += kLanes<Acc>) {
    store_keys<Key<Acc>>(key_of<Acc>(load(scratch->row.values + e)), scratch->keys.values + e);
  }
}

template <typename Acc>
EDL_INLINE void fill_keys_with_bias(Acc factor, RouteScratch<Acc>* scratch) {
  for (int64_t e = 0; e < scratch->row.padded; e += kLanes<Acc>) {
    const Vector<Acc> score = load(scratch->scores.values + e) * factor;
    const Vector<Key<Acc>> key = key_of<Acc>(score + load(scratch->bias.values + e));
    const auto closed = load(scratch->row.values + e) == -std::numeric_limits<Acc>::infinity();
    store_keys<Key<Acc>>(closed ? broadcast<Key<Acc>>(kClosed<Key<Acc>>) : key, scratch->keys.values + e);
  }
}

// Fills `chosen` for the row in scratch.row unless it was given, and returns the sum of the row's scores where that was
// formed.
template <Scores score, typename Acc>
EDL_INLINE Acc choose(const RouteTask& task, const uint8_t* allowed, RouteScratch<Acc>* scratch, int64_t* chosen) {
  Acc sum = 0;
  if (task.bias != nullptr || (is_share_of_row(score) && !task.normalize)) {
    std::memcpy(scratch->scores.values, scratch->row.values, scratch->row.padded * sizeof(Acc));
    sum = score_row<score>(scratch->scores.values, scratch->scores.padded);
  }
  if (task.given) {
    return sum;
  }
  if (task.bias != nullptr) {
    fill_keys_with_bias<Acc>(is_share_of_row(score) ? 1 / sum : Acc(1), scratch);
  } else {
    fill_keys_with_logits<Acc>(scratch);
  }
  if (allowed != nullptr) {
    fill_forbidden(allowed, task.num_experts, kForbidden<Key<Acc>>, scratch->keys.values);
  }
  for (int64_t e = task.num_experts; e < scratch->keys.padded; ++e) {
    scratch->keys.values[e] = kLowest<Key<Acc>>;
  }
  take_highest(scratch->keys.values, scratch->keys.padded, task.top_k, chosen);
  return sum;
}

// ---- the weights ----

// The chosen entries of `values`, padded like a row. Of none, which may be among the given ones, what masked experts
// have: `masked`.
template <typename Task, typename Acc>
EDL_INLINE void gather_chosen(
    const Task& task, const Acc* values, const int64_t* chosen, Acc masked, RowBuffer<Acc>* few) {
  if (task.given) {
    for (int64_t k = 0; k < task.top_k; ++k) {
      few->values[k] = chosen[k] < task.num_experts ? values[chosen[k]] : masked;
    }
  } else {
    for (int64_t k = 0; k < task.top_k; ++k) {
      few->values[k] = values[chosen[k]];
    }
  }
  for (int64_t k = task.top_k; k < few->padded; ++k) {
    few->values[k] = -std::numeric_limits<Acc>::infinity();
  }
}

// Whether a row has no distribution that given experts could have a share of: no expert is open, or a softmax meets NaN
// or infinity. Chosen experts show both themselves, as they are the highest.
template <Scores score, typename Acc>
EDL_INLINE bool is_undefined(const Acc* row, int64_t num_experts) {
  bool is_open = false, is_finite = true;
  for (int64_t e = 0; e < num_experts; ++e) {
    is_open |= row[e] != -std::numeric_limits<Acc>::infinity();
    is_finite &= row[e] < std::numeric_limits<Acc>::infinity();
  }
  return !is_open || (is_share_of_row(score) && !is_finite);
}

template <Scores score, typename Acc>
EDL_INLINE void weigh(
    const RouteTask& task, const int64_t* chosen, Acc row_sum, RouteScratch<Acc>* scratch, Acc* weights) {
  RowBuffer<Acc>& few = scratch->few;
  Acc factor = static_cast<Acc>(task.scale);
  if (is_share_of_row(score) && !task.normalize) {
    gather_chosen(task, scratch->scores.values, chosen, Acc(0), &few);
    factor /= row_sum;
  } else {
    // Softmax over the chosen logits alone is the same quotient, and cannot underflow to 0 / 0.
    gather_chosen(task, scratch->row.values, chosen, -std::numeric_limits<Acc>::infinity(), &few);
    const Acc sum = score_row<score>(few.values, few.padded);
    factor *= task.normalize ? normaliser<score, Acc>(sum) : Acc(1);
    factor = row_sum != row_sum ? row_sum : factor; // a NaN that a bias kept out of the choice
  }
  const Acc* row = scratch->row.values;
  const bool undefined = task.given ? is_undefined<score>(row, task.num_experts)
                                    : row[chosen[0]] == -std::numeric_limits<Acc>::infinity(); // no expert is open
  if (undefined) {
    factor = std::numeric_limits<Acc>::quiet_NaN();
  }
  for (int64_t k = 0; k < task.top_k; ++k) {
    weights[k] = few.values[k] * factor;
  }
  for (int64_t k = 0; task.given && k < task.top_k; ++k) {
    weights[k] = chosen[k] < task.num_experts ? weights[k] : Acc(0);
  }
}

template <typename Storage, Scores score>
void route_rows(const RouteTask& task, int64_t begin, int64_t end) {
  using Acc = Accumulation<Storage>;
  const auto* logits = static_cast<const Storage*>(task.logits);
  RouteScratch<Acc> scratch(task.num_experts, task.top_k);
  if (task.bias != nullptr) {
    load_row(static_cast<const Acc*>(task.bias), task.num_experts, scratch.bias.values);
  }
  for (int64_t t = begin; t < end; ++t) {
    int64_t* chosen = task.experts + t * task.top_k;
    load_row(logits + t * task.row_stride, task.num_experts, scratch.row.values);
    const uint8_t* allowed = task.allowed != nullptr ? task.allowed + t * task.allowed_stride : nullptr;
    if (allowed != nullptr) {
      fill_forbidden(allowed, task.num_experts, -std::numeric_limits<Acc>::infinity(), scratch.row.values);
    }
    const Acc row_sum = choose<score, Acc>(task, allowed, &scratch, chosen);
    weigh<score, Acc>(task, chosen, row_sum, &scratch, static_cast<Acc*>(task.weights) + t * task.top_k);
  }
}

// ---- backward ----

// A slot of weight 0 hands nothing on, even where its expert's output, and so the gradient of its weight, is NaN.
template <typename Acc>
EDL_INLINE Acc times(Acc score, Acc grad) {
  return score == 0 ? Acc(0) : score * grad;
}

// few: chosen logits in, their gradient out, where no other logit enters the weights: all cases but the plain softmax.
// Normalised softmax: w_k (g_k - <g, w>); sigmoid: s_k (1 - s_k) (g_k - <g, s> / sum) / sum, or s_k (1 - s_k) g_k.
template <Scores score, typename Acc>
EDL_INLINE void backward_of_chosen(const RouteGradient& task, const Acc* grad, bool undefined, RowBuffer<Acc>* few) {
  const Acc scale = undefined ? std::numeric_limits<Acc>::quiet_NaN() : static_cast<Acc>(task.scale);
  const Acc sum = score_row<score>(few->values, few->padded);
  const Acc inverse = task.normalize ? normaliser<score, Acc>(sum) : Acc(1);
  Acc dot = 0;
  for (int64_t k = 0; task.normalize && k < task.top_k; ++k) {
    dot += times<Acc>(few->values[k], grad[k]) * inverse;
  }
  for (int64_t k = 0; k < task.top_k; ++k) {
    const Acc s = few->values[k];
    few->values[k] = times<Acc>(slope_of<score>(s) * inverse, grad[k] - dot) * scale;
  }
}

// row: logits in, gradient out: p_e (g_e - <g, p>), g_e = 0 for an expert that was not chosen.
template <typename Acc>
EDL_INLINE void backward_of_row(
    const RouteGradient& task, const Acc* grad, const int64_t* chosen, RowBuffer<Acc>* row, RowBuffer<Acc>* few) {
  const Acc inverse = static_cast<Acc>(1) / score_row<Scores::softmax>(row->values, row->padded);
  Acc dot = 0;
  gather_chosen(task, row->values, chosen, Acc(0), few);
  for (int64_t k = 0; k < task.top_k; ++k) {
    few->values[k] = times<Acc>(few->values[k] * inverse, grad[k]) * static_cast<Acc>(task.scale);
    dot += few->values[k];
  }
  const Acc factor = -dot * inverse;
  for (int64_t e = 0; e < row->padded; e += kLanes<Acc>) {
    store(load(row->values + e) * factor, row->values + e);
  }
  for (int64_t k = 0; k < task.top_k; ++k) {
    if (!task.given || chosen[k] < task.num_experts) {
      row->values[chosen[k]] += few->values[k];
    }
  }
}

// row: logits in, gradient out.
template <Scores score, typename Acc>
EDL_INLINE void backward_of_weights(
    const RouteGradient& task, const Acc* grad, const int64_t* chosen, RowBuffer<Acc>* row, RowBuffer<Acc>* few) {
  if (is_share_of_row(score) && !task.normalize) {
    return backward_of_row<Acc>(task, grad, chosen, row, few);
  }
  constexpr Acc masked = -std::numeric_limits<Acc>::infinity();
  gather_chosen(task, row->values, chosen, masked, few);
  const bool undefined = task.given ? is_undefined<score>(row->values, task.num_experts) : few->values[0] == masked;
  backward_of_chosen<score, Acc>(task, grad, undefined, few);
  std::memset(row->values, 0, row->padded * sizeof(Acc));
  for (int64_t k = 0; k < task.top_k; ++k) {
    if (!task.given || chosen[k] < task.num_experts) {
      row->values[chosen[k]] = few->values[k];
    }
  }
}

// Whether all given experts are none.
EDL_INLINE bool has_no_choice(const RouteGradient& task, const int64_t* chosen) {
  bool has_one = !task.given;
  for (int64_t k = 0; task.given && k < task.top_k; ++k) {
    has_one |= chosen[k] < task.num_experts;
  }
  return !has_one;
}

template <typename Storage, Scores score>
void spread_rows(const RouteGradient& task, int64_t begin, int64_t end) {
  using Acc = Accumulation<Storage>;
  RowBuffer<Acc> row(task.num_experts);
  RowBuffer<Acc> few(task.top_k);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t* chosen = task.experts + t * task.top_k;
    const Acc* grad = static_cast<const Acc*>(task.grad_weights) + t * task.top_k;
    load_row(static_cast<const Storage*>(task.logits) + t * task.row_stride, task.num_experts, row.values);
    const uint8_t* allowed = task.allowed != nullptr ? task.allowed + t * task.allowed_stride : nullptr;
    if (allowed != nullptr) {
      fill_forbidden(allowed, task.num_experts, -std::numeric_limits<Acc>::infinity(), row.values);
    }
    if (has_no_choice(task, chosen)) {
      std::memset(row.values, 0, row.padded * sizeof(Acc));
    } else {
      backward_of_weights<score, Acc>(task, grad, chosen, &row, &few);
    }
    if (allowed != nullptr) {
      fill_forbidden(allowed, task.num_experts, Acc(0), row.values);
    }
    write_row(row.values, task.num_experts, static_cast<Storage*>(task.grad_logits) + t * task.num_experts);
  }
}

} // namespace

extern const RouteTokensLoops route_tokens_loops = {
    {{EDL_SCORE_LOOPS(route_rows, float)},
     {EDL_SCORE_LOOPS(route_rows, double)},
     {EDL_SCORE_LOOPS(route_rows, BFloat16)},
     {EDL_SCORE_LOOPS(route_rows, Float16)}},
    {{EDL_SCORE_LOOPS(spread_rows, float)},
     {EDL_SCORE_LOOPS(spread_rows, double)},
     {EDL_SCORE_LOOPS(spread_rows, BFloat16)},
     {EDL_SCORE_LOOPS(spread_rows, Float16)}},
};

} // namespace edl::cpu::EDL_ISA
