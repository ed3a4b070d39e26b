// Inner loops of aggregate_routing: rows [*, E] in float32, float64, bfloat16 or float16, sums in float32 (float64 for
// float64). Cost: one read of the rows forward; backward one write, and one read where a score lies between.
#include "cpu/isa/aggregate_routing.h"

#include "cpu/isa/simd.h"

namespace edl::EDL_ISA {
namespace {

enum class Score { softmax, sigmoid, none };

// A row's columns are walked a block at a time, so that a block's sums stay in registers over all rows.
constexpr int64_t kBlock = 8;
constexpr int64_t kRowsAtOnce = 256;
constexpr int64_t kColumnsOnStack = 1024;

template <typename Acc>
EDL_INLINE Acc sigmoid_sum_epsilon() {
  return static_cast<Acc>(1e-20);
}

void count_row(double sum, bool negative, double tolerance, int64_t row, RowCensus* census) {
  if (!(std::fabs(sum) <= std::numeric_limits<double>::max())) {
    return;
  }
  ++census->finite;
  if (!negative && std::fabs(sum - 1.0) <= tolerance) {
    ++census->distributions;
  } else if (census->first_other < 0) {
    census->first_other = row;
  }
}

EDL_INLINE int64_t row_at(const RoutingRows& rows, int64_t i) {
  return rows.order != nullptr ? rows.order[i] : i;
}

// ---- forward, no score: a plain sum ----

// Adds `count` rows' columns [column, column + vectors * lanes) to sums, and each row's own sum and minimum to row_sum
// and row_minimum.
template <typename Storage, int64_t vectors, typename Acc = Accumulation<Storage>>
EDL_INLINE void sum_block(
    const RoutingRows& rows, int64_t first, int64_t count, int64_t column, Acc* sums, Acc* row_sum, Acc* row_minimum) {
  constexpr int64_t lanes = kLanes<Acc>;
  const auto* data = static_cast<const Storage*>(rows.data);
  Vector<Acc> total[vectors];
  for (int64_t v = 0; v < vectors; ++v) {
    total[v] = load(sums + column + v * lanes);
  }
  for (int64_t i = 0; i < count; ++i) {
    const Storage* row = data + row_at(rows, first + i) * rows.row_stride + column;
    Vector<Acc> x = load(row);
    Vector<Acc> across = x;
    Vector<Acc> least = x;
    total[0] += x;
    for (int64_t v = 1; v < vectors; ++v) {
      x = load(row + v * lanes);
      total[v] += x;
      across += x;
      least = minimum<Acc>(x, least);
    }
    row_sum[i] += sum_of<Acc>(across);
    const Acc lowest = -max_of<Acc>(-least);
    row_minimum[i] = lowest < row_minimum[i] ? lowest : row_minimum[i];
  }
  for (int64_t v = 0; v < vectors; ++v) {
    store(total[v], sums + column + v * lanes);
  }
}

template <typename Storage, typename Acc = Accumulation<Storage>>
void sum_tail(
    const RoutingRows& rows, int64_t first, int64_t count, int64_t column, Acc* sums, Acc* row_sum, Acc* row_minimum) {
  const auto* data = static_cast<const Storage*>(rows.data);
  for (int64_t i = 0; i < count; ++i) {
    const Storage* row = data + row_at(rows, first + i) * rows.row_stride;
    for (int64_t e = column; e < rows.num_experts; ++e) {
      const Acc x = widen(row[e]);
      sums[e] += x;
      row_sum[i] += x;
      row_minimum[i] = x < row_minimum[i] ? x : row_minimum[i];
    }
  }
}

template <typename Storage>
void sum_plain_rows(const RoutingRows& rows, double tolerance, void* sums_out, RowCensus* census) {
  using Acc = Accumulation<Storage>;
  constexpr int64_t lanes = kLanes<Acc>;
  auto* sums = static_cast<Acc*>(sums_out);
  Acc row_sum[kRowsAtOnce];
  Acc row_minimum[kRowsAtOnce];
  for (int64_t first = rows.begin; first < rows.end; first += kRowsAtOnce) {
    const int64_t count = rows.end - first < kRowsAtOnce ? rows.end - first : kRowsAtOnce;
    std::memset(row_sum, 0, sizeof(row_sum));
    std::memset(row_minimum, 0, sizeof(row_minimum));
    int64_t column = 0;
    for (; column + kBlock * lanes <= rows.num_experts; column += kBlock * lanes) {
      sum_block<Storage, kBlock>(rows, first, count, column, sums, row_sum, row_minimum);
    }
    for (; column + lanes <= rows.num_experts; column += lanes) {
      sum_block<Storage, 1>(rows, first, count, column, sums, row_sum, row_minimum);
    }
    if (column < rows.num_experts) {
      sum_tail<Storage>(rows, first, count, column, sums, row_sum, row_minimum);
    }
    for (int64_t i = 0; i < count; ++i) {
      count_row(row_sum[i], row_minimum[i] < 0, tolerance, row_at(rows, first + i), census);
    }
  }
}

// ---- scores, on one row widened into a padded buffer ----

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

// While no row has turned out to be logits, looks whether this one could be a distribution.
template <typename Acc>
EDL_INLINE void census_of_row(
    const Acc* values, int64_t num_experts, double tolerance, int64_t row, RowCensus* census) {
  if (census->first_other >= 0) {
    return; // one row of logits settles it
  }
  double sum = 0;
  bool negative = false;
  for (int64_t e = 0; e < num_experts; ++e) {
    sum += values[e];
    negative |= values[e] < 0;
  }
  count_row(sum, negative, tolerance, row, census);
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

template <typename Storage, Score score>
void sum_scored_rows(const RoutingRows& rows, double tolerance, void* sums_out, RowCensus* census) {
  using Acc = Accumulation<Storage>;
  constexpr int64_t lanes = kLanes<Acc>;
  auto* sums = static_cast<Acc*>(sums_out);
  const auto* data = static_cast<const Storage*>(rows.data);
  const int64_t num_experts = rows.num_experts;
  RowBuffer<Acc> buffer(num_experts);
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    const int64_t row = row_at(rows, i);
    load_row(data + row * rows.row_stride, num_experts, buffer.values);
    census_of_row(buffer.values, num_experts, tolerance, row, census);
    const Acc scale = normaliser<score>(score_row<score>(buffer.values, buffer.padded));
    int64_t e = 0;
    for (; e + lanes <= num_experts; e += lanes) {
      store(load(sums + e) + load(buffer.values + e) * scale, sums + e);
    }
    for (; e < num_experts; ++e) {
      sums[e] += buffer.values[e] * scale;
    }
  }
}

// ---- backward ----

EDL_INLINE int64_t segment_at(const RoutingGradient& gradient, int64_t t) {
  return gradient.ids_are_64_bit ? static_cast<const int64_t*>(gradient.segment_ids)[t]
                                 : static_cast<const int32_t*>(gradient.segment_ids)[t];
}

// Writes one row: values[e] of the accumulation type, narrowed.
template <bool past_caches, typename Storage, typename Acc = Accumulation<Storage>>
EDL_INLINE void write_row(const Acc* values, int64_t num_experts, Storage* out) {
  constexpr int64_t lanes = kLanes<Acc>;
  int64_t e = 0;
  for (; e + lanes <= num_experts; e += lanes) {
    if constexpr (past_caches) {
      stream(load(values + e), out + e);
    } else {
      store(load(values + e), out + e);
    }
  }
  for (; e < num_experts; ++e) {
    narrow(values[e], out + e);
  }
}

// d/dz_i of sum_j g_j q_j, with q = score(z): softmax q_i (g_i - <g, q>), sigmoid q_i (1 - s_i) (g_i - <g, q>).
template <Score score, typename Acc>
EDL_INLINE void backward_through_score(const Acc* grad, int64_t num_experts, int64_t padded, Acc* values) {
  constexpr int64_t lanes = kLanes<Acc>;
  const Acc scale = normaliser<score>(score_row<score>(values, padded));
  Vector<Acc> dots{};
  int64_t e = 0;
  for (; e + lanes <= num_experts; e += lanes) {
    dots += load(values + e) * load(grad + e);
  }
  Acc dot = sum_of<Acc>(dots);
  for (; e < num_experts; ++e) {
    dot += values[e] * grad[e];
  }
  dot *= scale;
  for (e = 0; e + lanes <= num_experts; e += lanes) {
    const Vector<Acc> s = load(values + e);
    Vector<Acc> slope = s * scale;
    if constexpr (score == Score::sigmoid) {
      slope *= 1 - s;
    }
    store(slope * (load(grad + e) - dot), values + e);
  }
  for (; e < num_experts; ++e) {
    const Acc s = values[e];
    values[e] = s * scale * (score == Score::sigmoid ? 1 - s : Acc(1)) * (grad[e] - dot);
  }
}

template <bool past_caches, typename Storage, Score score>
void spread(const RoutingGradient& gradient, int64_t begin, int64_t end) {
  using Acc = Accumulation<Storage>;
  const int64_t num_experts = gradient.num_experts;
  const auto* grad_sums = static_cast<const Acc*>(gradient.grad_sums);
  const auto* routing = static_cast<const Storage*>(gradient.routing);
  auto* out = static_cast<Storage*>(gradient.grad_routing);
  RowBuffer<Acc> buffer(num_experts);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t segment = segment_at(gradient, t);
    if (segment < 0) {
      std::memset(out + t * num_experts, 0, num_experts * sizeof(Storage));
      continue;
    }
    const Acc* values = grad_sums + segment * num_experts;
    if constexpr (score != Score::none) {
      load_row(routing + t * gradient.row_stride, num_experts, buffer.values);
      backward_through_score<score>(values, num_experts, buffer.padded, buffer.values);
      values = buffer.values;
    }
    write_row<past_caches>(values, num_experts, out + t * num_experts);
  }
  if constexpr (past_caches) {
    stream_fence();
  }
}

template <typename Storage, Score score>
void spread_rows(const RoutingGradient& gradient, int64_t begin, int64_t end) {
  // Streaming stores want every vector aligned.
  const bool aligned = reinterpret_cast<uintptr_t>(gradient.grad_routing) % EDL_VECTOR_BYTES == 0 &&
      gradient.num_experts * sizeof(Storage) % EDL_VECTOR_BYTES == 0;
  if (gradient.past_caches && aligned) {
    spread<true, Storage, score>(gradient, begin, end);
  } else {
    spread<false, Storage, score>(gradient, begin, end);
  }
}

} // namespace

#define EDL_ALL_SCORES(loop, Storage) \
  { loop<Storage, Score::softmax>, loop<Storage, Score::sigmoid>, loop<Storage, Score::none> }
#define EDL_SUM_SCORES(Storage) \
  { sum_scored_rows<Storage, Score::softmax>, sum_scored_rows<Storage, Score::sigmoid>, sum_plain_rows<Storage> }

extern const AggregateRoutingLoops aggregate_routing_loops = {
    {EDL_SUM_SCORES(float), EDL_SUM_SCORES(double), EDL_SUM_SCORES(BFloat16), EDL_SUM_SCORES(Float16)},
    {EDL_ALL_SCORES(spread_rows, float),
     EDL_ALL_SCORES(spread_rows, double),
     EDL_ALL_SCORES(spread_rows, BFloat16),
     EDL_ALL_SCORES(spread_rows, Float16)},
};

} // namespace edl::EDL_ISA
