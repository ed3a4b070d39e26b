// Inner loops of aggregate_routing: rows [*, E] in float32, float64, bfloat16 or float16, sums in float32 (float64 for
// float64). Cost: one read of the rows forward; backward one write, and one read where a score lies between.
#include "cpu/isa/aggregate_routing.h"

#include <type_traits>

#include "cpu/isa/row_census.h"
#include "cpu/isa/row_scores.h"
#include "cpu/isa/simd.h"

namespace edl::cpu::EDL_ISA {
namespace {

constexpr int64_t kVectorsOnStack = 64;

// ---- forward, no score: a plain sum ----

template <typename Acc>
using Bits = std::conditional_t<sizeof(Acc) == 4, Int32s, Int64s>;

// Adds row i to the sums of its piece and looks whether it is a distribution.
template <typename Storage, typename Acc = Accumulation<Storage>>
EDL_INLINE void add_plain_row(const RoutingRows& rows, int64_t i, double tolerance, const RowPiece& piece) {
  constexpr int64_t lanes = kLanes<Acc>;
  const int64_t num_experts = rows.num_experts;
  const int64_t t = row_at(rows, i);
  const Storage* row = static_cast<const Storage*>(rows.data) + t * rows.row_stride;
  auto* sums = static_cast<Acc*>(piece.sums);
  Vector<Acc> across[2] = {}; // two chains of additions
  Bits<Acc> bits = {};
  int64_t e = 0;
  const auto add_vector = [&](int64_t chain) {
    const Vector<Acc> x = load(row + e);
    Bits<Acc> x_bits;
    std::memcpy(&x_bits, &x, sizeof(x));
    store(load(sums + e) + x, sums + e);
    across[chain] += x;
    bits |= x_bits;
    e += lanes;
  };
  while (e + 2 * lanes <= num_experts) {
    add_vector(0);
    add_vector(1);
  }
  if (e + lanes <= num_experts) {
    add_vector(0);
  }
  bool maybe_negative = false; // or -0, or a NaN
  for (int64_t lane = 0; lane < lanes; ++lane) {
    maybe_negative |= bits[lane] < 0;
  }
  Acc row_sum = sum_of<Acc>(across[0] + across[1]);
  for (; e < num_experts; ++e) {
    const Acc x = widen(row[e]);
    sums[e] += x;
    row_sum += x;
    maybe_negative |= x < 0;
  }
  bool negative = false;
  for (int64_t j = 0; maybe_negative && j < num_experts; ++j) {
    negative |= widen(row[j]) < 0;
  }
  count_row(row_sum, negative, tolerance, t, piece.census);
}

template <typename Storage>
EDL_FLATTEN void sum_plain_pieces(
    const RoutingRows& rows, const RowPiece* pieces, int64_t num_pieces, double tolerance) {
  bool any = true;
  for (int64_t i = 0; any; ++i) {
    any = false;
    for (int64_t p = 0; p < num_pieces; ++p) {
      if (pieces[p].begin + i < pieces[p].end) {
        add_plain_row<Storage>(rows, pieces[p].begin + i, tolerance, pieces[p]);
        any = true;
      }
    }
  }
}

// ---- scores, on one row at a time ----

// One row of E values, padded to whole vectors. With `fixed` > 0 that many vectors, which the compiler keeps in
// registers; with 0 any number, in memory.
template <typename Acc, int64_t fixed>
struct Row {
  explicit Row(int64_t) {}
  static constexpr int64_t vectors() {
    return fixed;
  }
  EDL_INLINE Vector<Acc>& operator[](int64_t v) {
    return values[v];
  }
  Vector<Acc> values[fixed];
};

template <typename Acc>
struct Row<Acc, 0> {
  explicit Row(int64_t num_experts)
      : count((num_experts + kLanes<Acc> - 1) / kLanes<Acc>),
        values(count <= kVectorsOnStack ? on_stack : new Vector<Acc>[count]) {}
  ~Row() {
    if (values != on_stack) {
      delete[] values;
    }
  }
  Row(const Row&) = delete;
  Row& operator=(const Row&) = delete;
  int64_t vectors() const {
    return count;
  }
  EDL_INLINE Vector<Acc>& operator[](int64_t v) {
    return values[v];
  }
  Vector<Acc> on_stack[kVectorsOnStack];
  int64_t count;
  Vector<Acc>* values;
};

template <typename Storage, typename Acc = Accumulation<Storage>>
__attribute__((noinline)) void store_part(Vector<Acc> x, int64_t entries, Storage* out) {
  for (int64_t lane = 0; lane < entries; ++lane) {
    narrow(static_cast<Acc>(x[lane]), out + lane);
  }
}

template <bool past_caches, int64_t fixed, typename Storage, typename Acc = Accumulation<Storage>>
EDL_INLINE void store_vector(Vector<Acc> x, int64_t v, int64_t num_experts, Storage* out) {
  constexpr int64_t lanes = kLanes<Acc>;
  if (fixed == 0 && (v + 1) * lanes > num_experts) {
    store_part(x, num_experts - v * lanes, out + v * lanes);
  } else if constexpr (past_caches) {
    stream(x, out + v * lanes);
  } else {
    store(x, out + v * lanes);
  }
}

// While no row has turned out to be logits, looks whether this one could be a distribution.
template <typename Storage>
__attribute__((noinline)) void take_census(
    const Storage* data, int64_t num_experts, double tolerance, int64_t row, RowCensus* census) {
  double sum = 0;
  bool negative = false;
  for (int64_t e = 0; e < num_experts; ++e) {
    const double x = widen(data[e]);
    sum += x;
    negative |= x < 0;
  }
  count_row(sum, negative, tolerance, row, census);
}

template <typename Storage>
__attribute__((noinline)) bool is_masked(const Storage* logits, int64_t num_experts) {
  using Acc = Accumulation<Storage>;
  int64_t e = 0;
  while (e < num_experts && widen(logits[e]) == -std::numeric_limits<Acc>::infinity()) {
    ++e;
  }
  return e == num_experts;
}

// What normalises the scores of a row; NaN for one that is masked wholly, which has no distribution.
template <Scores score, typename Storage, typename Acc>
EDL_INLINE Acc scale_of(const Storage* logits, int64_t num_experts, Acc sum) {
  if (!is_share_of_row(score) && sum == 0 && is_masked(logits, num_experts)) {
    return std::numeric_limits<Acc>::quiet_NaN();
  }
  return normaliser<score, Acc>(sum);
}

// A row is added up once the next one is scored: else all would wait for the sum of its scores.
template <typename Storage, Scores score, int64_t fixed>
EDL_FLATTEN void sum_scored(const RoutingRows& rows, const RowPiece& piece, double tolerance) {
  using Acc = Accumulation<Storage>;
  const auto* data = static_cast<const Storage*>(rows.data);
  const int64_t num_experts = rows.num_experts;
  Row<Acc, fixed> total(num_experts);
  Row<Acc, fixed> scored[2] = {Row<Acc, fixed>(num_experts), Row<Acc, fixed>(num_experts)};
  for_vectors<fixed>(total.vectors(), [&](int64_t v) { total[v] = Vector<Acc>{}; });
  const auto add = [&](Row<Acc, fixed>& row, Acc scale) {
    for_vectors<fixed>(total.vectors(), [&](int64_t v) { total[v] += row[v] * scale; });
  };
  bool maybe_distributions = true;
  const auto row_of = [&](int64_t i) { return data + row_at(rows, i) * rows.row_stride; };
  Acc next_top = piece.begin < piece.end ? top_of<score, fixed>(row_of(piece.begin), num_experts) : 0;
  Acc scale_before = 0;
  for (int64_t i = piece.begin; i < piece.end; ++i) {
    const Storage* entries = row_of(i);
    const Acc top = next_top;
    if (i + 1 < piece.end) {
      next_top = top_of<score, fixed>(row_of(i + 1), num_experts);
    }
    if (maybe_distributions) {
      take_census(entries, num_experts, tolerance, row_at(rows, i), piece.census);
      maybe_distributions = piece.census->first_other < 0; // one row of logits settles it
    }
    Row<Acc, fixed>& row = scored[i & 1];
    const Acc sum = for_scores<score, fixed>(entries, num_experts, top, [&](int64_t v, Vector<Acc> x) { row[v] = x; });
    if (i > piece.begin) {
      add(scored[(i - 1) & 1], scale_before);
    }
    scale_before = scale_of<score>(entries, num_experts, sum);
  }
  if (piece.begin < piece.end) {
    add(scored[(piece.end - 1) & 1], scale_before);
  }
  auto* sums = static_cast<Acc*>(piece.sums);
  for_vectors<fixed>(total.vectors(), [&](int64_t v) { store_vector<false, fixed>(total[v], v, num_experts, sums); });
}

// Calls `run` with the number of vectors of a row where that is a small power of two, else with 0.
template <typename Acc, typename Run>
EDL_INLINE void with_fixed_length(int64_t num_experts, Run run) {
  constexpr int64_t lanes = kLanes<Acc>;
  switch (num_experts % lanes == 0 ? num_experts / lanes : 0) {
    case 1:
      return run(std::integral_constant<int64_t, 1>{});
    case 2:
      return run(std::integral_constant<int64_t, 2>{});
    case 4:
      return run(std::integral_constant<int64_t, 4>{});
    case 8:
      return run(std::integral_constant<int64_t, 8>{});
    case 16:
      return run(std::integral_constant<int64_t, 16>{});
    default:
      return run(std::integral_constant<int64_t, 0>{});
  }
}

template <typename Storage, Scores score>
void sum_scored_pieces(const RoutingRows& rows, const RowPiece* pieces, int64_t num_pieces, double tolerance) {
  with_fixed_length<Accumulation<Storage>>(rows.num_experts, [&](auto fixed) {
    for (int64_t p = 0; p < num_pieces; ++p) {
      sum_scored<Storage, score, decltype(fixed)::value>(rows, pieces[p], tolerance);
    }
  });
}

// ---- backward ----

EDL_INLINE int64_t segment_at(const RoutingGradient& gradient, int64_t t) {
  return gradient.ids_are_64_bit ? static_cast<const int64_t*>(gradient.segment_ids)[t]
                                 : static_cast<const int32_t*>(gradient.segment_ids)[t];
}

// A scored row whose gradient is still to be written.
template <typename Storage, typename Acc, int64_t fixed>
struct ScoredRow {
  Row<Acc, fixed>* scores; // not normalised; null where there is no row
  const Acc* grad;
  Storage* out;
  Acc scale; //       that normalises
  Acc scaled_dot; //  scale² · Σ grad · scores
};

// The gradient of sum_j g_j q_j with q = score(z) to z: softmax q_i (g_i - <g, q>), sigmoid
// q_i (1 - sigmoid(z_i)) (g_i - <g, q>).
template <bool past_caches, Scores score, int64_t fixed, typename Storage, typename Acc>
EDL_INLINE void write_gradient(const ScoredRow<Storage, Acc, fixed>& row, int64_t num_experts) {
  if (row.scores == nullptr) {
    return;
  }
  for_vectors<fixed>(row.scores->vectors(), [&](int64_t v) {
    const Vector<Acc> slope = slope_of<score>((*row.scores)[v]);
    const Vector<Acc> grad = load_vector<fixed>(row.grad, v, num_experts, Acc(0));
    store_vector<past_caches, fixed>(slope * (grad * row.scale - row.scaled_dot), v, num_experts, row.out);
  });
}

// As in the forward pass, a row is written once the next one is scored.
template <bool past_caches, typename Storage, Scores score, int64_t fixed>
EDL_FLATTEN void spread_through_scores(const RoutingGradient& gradient, int64_t begin, int64_t end) {
  using Acc = Accumulation<Storage>;
  const int64_t num_experts = gradient.num_experts;
  const auto* grad_sums = static_cast<const Acc*>(gradient.grad_sums);
  const auto* routing = static_cast<const Storage*>(gradient.routing);
  auto* out = static_cast<Storage*>(gradient.grad_routing);
  Row<Acc, fixed> scored[2] = {Row<Acc, fixed>(num_experts), Row<Acc, fixed>(num_experts)};
  const auto row_of = [&](int64_t t) { return routing + t * gradient.row_stride; };
  Acc next_top = begin < end ? top_of<score, fixed>(row_of(begin), num_experts) : 0;
  ScoredRow<Storage, Acc, fixed> before = {};
  for (int64_t t = begin; t < end; ++t) {
    const Acc top = next_top;
    if (t + 1 < end) {
      next_top = top_of<score, fixed>(row_of(t + 1), num_experts);
    }
    const int64_t segment = segment_at(gradient, t);
    if (segment < 0) {
      std::memset(out + t * num_experts, 0, num_experts * sizeof(Storage));
      continue;
    }
    const Acc* grad = grad_sums + segment * num_experts;
    Row<Acc, fixed>& row = scored[before.scores == &scored[0] ? 1 : 0];
    Vector<Acc> dots{};
    const Acc sum = for_scores<score, fixed>(row_of(t), num_experts, top, [&](int64_t v, Vector<Acc> x) {
      row[v] = x;
      dots += x * load_vector<fixed>(grad, v, num_experts, Acc(0));
    });
    write_gradient<past_caches, score>(before, num_experts);
    const Acc scale = scale_of<score>(row_of(t), num_experts, sum);
    before = {&row, grad, out + t * num_experts, scale, sum_of<Acc>(dots) * scale * scale};
  }
  write_gradient<past_caches, score>(before, num_experts);
}

template <bool past_caches, typename Storage, int64_t fixed>
EDL_FLATTEN void spread_plainly(const RoutingGradient& gradient, int64_t begin, int64_t end) {
  using Acc = Accumulation<Storage>;
  const int64_t num_experts = gradient.num_experts;
  const int64_t vectors = (num_experts + kLanes<Acc> - 1) / kLanes<Acc>;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t segment = segment_at(gradient, t);
    Storage* out = static_cast<Storage*>(gradient.grad_routing) + t * num_experts;
    if (segment < 0) {
      std::memset(out, 0, num_experts * sizeof(Storage));
      continue;
    }
    const Acc* grad = static_cast<const Acc*>(gradient.grad_sums) + segment * num_experts;
    for_vectors<fixed>(vectors, [&](int64_t v) {
      store_vector<past_caches, fixed>(load_vector<fixed>(grad, v, num_experts, Acc(0)), v, num_experts, out);
    });
  }
}

template <bool past_caches, typename Storage, Scores score, int64_t fixed>
void spread(const RoutingGradient& gradient, int64_t begin, int64_t end) {
  if constexpr (score == Scores::none) {
    spread_plainly<past_caches, Storage, fixed>(gradient, begin, end);
  } else {
    spread_through_scores<past_caches, Storage, score, fixed>(gradient, begin, end);
  }
  if constexpr (past_caches) {
    stream_fence();
  }
}

template <typename Storage, Scores score>
void spread_rows(const RoutingGradient& gradient, int64_t begin, int64_t end) {
  // Streaming stores want every vector aligned.
  const bool aligned = reinterpret_cast<uintptr_t>(gradient.grad_routing) % EDL_VECTOR_BYTES == 0 &&
      gradient.num_experts * sizeof(Storage) % EDL_VECTOR_BYTES == 0;
  with_fixed_length<Accumulation<Storage>>(gradient.num_experts, [&](auto fixed) {
    if (gradient.past_caches && aligned) {
      spread<true, Storage, score, decltype(fixed)::value>(gradient, begin, end);
    } else {
      spread<false, Storage, score, decltype(fixed)::value>(gradient, begin, end);
    }
  });
}

} // namespace

#define EDL_SUM_LOOPS(Storage) {EDL_SCORE_LOOPS(sum_scored_pieces, Storage) sum_plain_pieces<Storage>}
#define EDL_SPREAD_LOOPS(Storage) {EDL_SCORE_LOOPS(spread_rows, Storage) spread_rows<Storage, Scores::none>}

extern const AggregateRoutingLoops aggregate_routing_loops = {
    {EDL_SUM_LOOPS(float), EDL_SUM_LOOPS(double), EDL_SUM_LOOPS(BFloat16), EDL_SUM_LOOPS(Float16)},
    {EDL_SPREAD_LOOPS(float), EDL_SPREAD_LOOPS(double), EDL_SPREAD_LOOPS(BFloat16), EDL_SPREAD_LOOPS(Float16)},
};

} // namespace edl::cpu::EDL_ISA
