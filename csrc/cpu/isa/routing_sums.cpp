// Inner loops of _routing_sums: rows [*, E] in float32, float64, bfloat16 or float16, computed in float32 (float64 for
// float64), sums over a piece's rows in float64 but for mass. As many rows as a vector has lanes go together, one in
// each lane: nothing is folded across lanes before the end of a piece. Cost for each row: E exponentials, E logarithms,
// and K + 1 comparisons of each score.
#include "cpu/isa/routing_sums.h"

#include <algorithm>
#include <limits>

#include "cpu/isa/row_census.h"
#include "cpu/isa/row_scores.h"
#include "cpu/isa/simd.h"

namespace edl::cpu::EDL_ISA {
namespace {

template <typename Acc>
inline constexpr int kWide = sizeof(double) / sizeof(Acc); // vectors of doubles for one of Acc

// Numbers of each lane, wide.
template <typename Acc>
struct Wide {
  Doubles part[kWide<Acc>] = {};
};

template <typename Acc>
EDL_INLINE Wide<Acc> widened(Vector<Acc> x) {
  typedef Acc Part __attribute__((vector_size(EDL_VECTOR_BYTES / kWide<Acc>)));
  Part parts[kWide<Acc>];
  std::memcpy(parts, &x, sizeof(x));
  Wide<Acc> wide;
  each<kWide<Acc>>([&](int i) { wide.part[i] = __builtin_convertvector(parts[i], Doubles); });
  return wide;
}

template <typename Acc>
EDL_INLINE double sum_of_wide(const Wide<Acc>& wide) {
  double sum = 0;
  for (int i = 0; i < kWide<Acc>; ++i) {
    sum += sum_of<double>(wide.part[i]);
  }
  return sum;
}

// Natural logarithms; of 0 some finite number.
template <typename Acc>
EDL_INLINE Wide<Acc> logarithms(Wide<Acc> x) {
  log_each<kWide<Acc>>(x.part);
  return x;
}

// The buffers of one piece: a vector for each expert, with a row in each lane.
template <typename Acc>
struct Columns {
  Columns(int64_t num_experts, int64_t num_kept)
      : scores(num_experts * kLanes<Acc>), mass(num_experts * kLanes<Acc>), highest(num_kept * kLanes<Acc>) {}
  RowBuffer<Acc> scores; //   not normalised
  RowBuffer<Acc> mass; //     so far
  RowBuffer<Acc> highest; //  K + 1 scores of each row, the highest first
};

// Rows first .. first + count become columns; lanes beside them hold zeros.
template <typename Storage, typename Acc = Accumulation<Storage>>
EDL_INLINE void load_columns(const RoutingRows& rows, int64_t first, int64_t count, Acc* columns) {
  constexpr int64_t lanes = kLanes<Acc>;
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const auto* row =
        static_cast<const Storage*>(rows.data) + row_at(rows, first + std::min(lane, count - 1)) * rows.row_stride;
    for (int64_t e = 0; e < rows.num_experts; ++e) {
      columns[e * lanes + lane] = lane < count ? widen(row[e]) : Acc(0);
    }
  }
}

// What is in the row of each lane before its scores.
template <typename Acc>
struct Found {
  Vector<Acc> top;
  Vector<Acc> lowest;
  Vector<Acc> sum;
};

template <typename Acc>
EDL_INLINE Found<Acc> look_at(const Acc* columns, int64_t num_experts) {
  const Vector<Acc> first = load(columns);
  Found<Acc> found{first, first, first};
  for (int64_t e = 1; e < num_experts; ++e) {
    const Vector<Acc> x = load(columns + e * kLanes<Acc>);
    found.top = maximum<Acc>(found.top, x);
    found.lowest = minimum<Acc>(found.lowest, x);
    found.sum += x;
  }
  return found;
}

template <typename Acc>
void take_census(
    const Found<Acc>& found,
    const RoutingRows& rows,
    int64_t first,
    int64_t count,
    double tolerance,
    RowCensus* census) {
  for (int64_t lane = 0; lane < count; ++lane) {
    count_row(found.sum[lane], found.lowest[lane] < 0, tolerance, row_at(rows, first + lane), census);
  }
}

// Scores in place; returns their sums.
template <Scores score, typename Acc>
EDL_INLINE Vector<Acc> score_columns(Vector<Acc> top, int64_t num_experts, Acc* columns) {
  Vector<Acc> sum{};
  const auto score_some = [&]<int count>(int64_t e, std::integral_constant<int, count>) {
    Acc* some = columns + e * kLanes<Acc>;
    Vector<Acc> x[count];
    each<count>([&](int i) { x[i] = load(some + i * kLanes<Acc>); });
    score_vectors<score, count, Acc>(top, x);
    each<count>([&](int i) {
      store(x[i], some + i * kLanes<Acc>);
      sum += x[i];
    });
  };
  int64_t e = 0;
  for (; e + 4 <= num_experts; e += 4) {
    score_some(e, std::integral_constant<int, 4>{});
  }
  for (; e < num_experts; ++e) {
    score_some(e, std::integral_constant<int, 1>{});
  }
  return sum;
}

// Σ x log x of each lane's scores.
template <typename Acc>
EDL_INLINE Wide<Acc> weighted_logarithms(const Acc* columns, int64_t num_experts) {
  Wide<Acc> sum;
  for (int64_t e = 0; e < num_experts; ++e) {
    const Wide<Acc> x = widened<Acc>(load(columns + e * kLanes<Acc>));
    const Wide<Acc> logs = logarithms<Acc>(x);
    for (int i = 0; i < kWide<Acc>; ++i) {
      sum.part[i] += x.part[i] * logs.part[i];
    }
  }
  return sum;
}

// -Σ p log p of each lane, of p = scale · x.
template <Scores score, typename Acc>
EDL_INLINE Wide<Acc> entropies(const Wide<Acc>& weighted, Vector<Acc> scales, Vector<Acc> sums) {
  Wide<Acc> result;
  const Wide<Acc> scale = widened<Acc>(scales), sum = widened<Acc>(sums), logs = logarithms<Acc>(scale);
  for (int i = 0; i < kWide<Acc>; ++i) {
    if constexpr (score == Scores::none) {
      result.part[i] = -scale.part[i] * weighted.part[i];
    } else {
      result.part[i] = -scale.part[i] * (weighted.part[i] + logs.part[i] * sum.part[i]);
    }
  }
  return result;
}

// Adds the normalised scores to the mass, and keeps the `num_kept` highest of each lane.
template <typename Acc>
EDL_INLINE void add_columns(Vector<Acc> scale, int64_t num_experts, int64_t num_kept, Columns<Acc>* columns) {
  constexpr int64_t lanes = kLanes<Acc>;
  Acc* highest = columns->highest.values;
  for (int64_t k = 0; k < num_kept; ++k) {
    store(broadcast(-std::numeric_limits<Acc>::infinity()), highest + k * lanes);
  }
  for (int64_t e = 0; e < num_experts; ++e) {
    Vector<Acc> x = load(columns->scores.values + e * lanes) * scale;
    store(load(columns->mass.values + e * lanes) + x, columns->mass.values + e * lanes);
    for (int64_t k = 0; k < num_kept; ++k) {
      const Vector<Acc> known = load(highest + k * lanes);
      store(maximum<Acc>(known, x), highest + k * lanes);
      x = minimum<Acc>(known, x);
    }
  }
}

// 1 over the sum of a row's scores; 0 in lanes without a row.
template <Scores score, typename Acc>
EDL_INLINE Vector<Acc> scales_of(const Found<Acc>& found, Vector<Acc> sum, int64_t count) {
  Vector<Acc> scale = broadcast<Acc>(1);
  if constexpr (score != Scores::none) {
    scale = normaliser<score, Acc>(sum);
    const auto masked = found.top == -std::numeric_limits<Acc>::infinity(); // wholly: there is no distribution
    scale = masked ? broadcast(std::numeric_limits<Acc>::quiet_NaN()) : scale;
  }
  for (int64_t lane = count; lane < kLanes<Acc>; ++lane) {
    scale[lane] = 0;
  }
  return scale;
}

template <typename Storage, Scores score>
EDL_FLATTEN void sum_piece(const RoutingRows& rows, int64_t top_k, double tolerance, ScoredPiece* piece) {
  using Acc = Accumulation<Storage>;
  constexpr int64_t lanes = kLanes<Acc>;
  const int64_t num_experts = rows.num_experts;
  const int64_t num_kept = top_k < num_experts ? top_k + 1 : 0;
  Columns<Acc> columns(num_experts, num_kept);
  std::fill_n(columns.mass.values, num_experts * lanes, Acc(0));
  Wide<Acc> entropy, margin;
  bool maybe_distributions = true;
  for (int64_t first = piece->begin; first < piece->end; first += lanes) {
    const int64_t count = std::min(lanes, piece->end - first);
    load_columns<Storage>(rows, first, count, columns.scores.values);
    const Found<Acc> found = look_at(columns.scores.values, num_experts);
    if (maybe_distributions) {
      take_census(found, rows, first, count, tolerance, piece->census);
      maybe_distributions = score == Scores::none || piece->census->first_other < 0; // one row of logits settles it
    }
    Vector<Acc> sum = found.sum;
    if constexpr (score != Scores::none) {
      sum = score_columns<score, Acc>(found.top, num_experts, columns.scores.values);
    }
    const Vector<Acc> scale = scales_of<score, Acc>(found, sum, count);
    add_columns<Acc>(scale, num_experts, num_kept, &columns);
    const Wide<Acc> own = entropies<score, Acc>(weighted_logarithms(columns.scores.values, num_experts), scale, sum);
    Vector<Acc> distance{};
    if (num_kept > 0) {
      const Acc* next = columns.highest.values + top_k * lanes;
      distance = load(next - lanes) - load(next);
      distance = sum == sum ? distance : sum; // a NaN, which has no order
    }
    const Wide<Acc> wide_distance = widened<Acc>(distance);
    for (int i = 0; i < kWide<Acc>; ++i) {
      entropy.part[i] += own.part[i];
      margin.part[i] += wide_distance.part[i];
    }
  }
  for (int64_t e = 0; e < num_experts; ++e) {
    piece->mass[e] = sum_of_wide(widened<Acc>(load(columns.mass.values + e * lanes)));
  }
  piece->entropy = sum_of_wide(entropy);
  piece->margin = sum_of_wide(margin);
}

} // namespace

#define EDL_PIECE_LOOPS(Storage) {EDL_SCORE_LOOPS(sum_piece, Storage) sum_piece<Storage, Scores::none>}

extern const RoutingSumsLoops routing_sums_loops = {
    {EDL_PIECE_LOOPS(float), EDL_PIECE_LOOPS(double), EDL_PIECE_LOOPS(BFloat16), EDL_PIECE_LOOPS(Float16)},
};

} // namespace edl::cpu::EDL_ISA
