// Inner loops over one pair of domain means p, q [E], in float64. With m = (p + q)/2 and u = (p - q)/(p + q):
//   D = 1/2 Σ m φ(u),  φ(u) = (1+u) log(1+u) + (1-u) log(1-u) = Σ_n u^2n / (n (2n - 1)),
//   dD/dp = 1/2 log(p/m),  dD/dq = 1/2 log(q/m).
// The series where |u| < 0.3: there the logarithms cancel. One logarithm and two divisions per expert.
#include "cpu/isa/expert_divergence.h"

#include "cpu/isa/simd.h"

namespace edl::cpu::EDL_ISA {
namespace {

constexpr int64_t kLane = kLanes<double>;
constexpr double kSmallest = std::numeric_limits<double>::min();
constexpr double kSeriesBelow = 0.09; // of u²: above it the logarithms cancel little
constexpr int kTogether = static_cast<int>(kRowPadding / kLane); // vectors whose logarithms go side by side

// The comparisons keep NaN: a NaN is never "smaller".
EDL_INLINE Doubles at_least(Doubles x, double lowest) {
  return x < lowest ? broadcast(lowest) : x;
}

void log_means(const double* means, int64_t length, double* out) {
  for (int64_t i = 0; i < length; i += kLane) {
    const Doubles p = load(means + i);
    Doubles log_p = at_least(p, kSmallest);
    log_each<1>(&log_p);
    store(p < 0 ? broadcast(std::numeric_limits<double>::quiet_NaN()) : log_p, out + i);
  }
}

// φ(u) / u² for s = u² < kSeriesBelow, in place: Σ_n s^(n-1) / (n (2n - 1)).
EDL_INLINE void series_each(Doubles* s) {
  constexpr int terms = 14;
  Doubles sum[kTogether] = {};
  for (int n = terms; n > 0; --n) {
    each<kTogether>([&](int i) { sum[i] = sum[i] * s[i] + 1.0 / (n * (2 * n - 1)); });
  }
  each<kTogether>([&](int i) { s[i] = sum[i]; });
}

template <bool with_slopes>
EDL_INLINE double divergence_of(
    const double* p_row,
    const double* q_row,
    const double* log_p_row,
    const double* log_q_row,
    int64_t length,
    double* slope_p,
    double* slope_q) {
  Doubles total{};
  for (int64_t first = 0; first < length; first += kRowPadding) {
    Doubles p[kTogether], q[kTogether], log_m[kTogether], s[kTogether], ratio[kTogether];
    each<kTogether>([&](int i) {
      p[i] = load(p_row + first + i * kLane);
      q[i] = load(q_row + first + i * kLane);
      log_m[i] = at_least((p[i] + q[i]) * 0.5, kSmallest);
      const Doubles u = (p[i] - q[i]) / at_least(p[i] + q[i], kSmallest);
      s[i] = ratio[i] = u * u;
    });
    log_each<kTogether>(log_m);
    series_each(ratio);
    each<kTogether>([&](int i) {
      const int64_t at = first + i * kLane;
      const Doubles a = at_least(load(log_p_row + at) - log_m[i], kLowestLogRatio);
      const Doubles b = at_least(load(log_q_row + at) - log_m[i], kLowestLogRatio);
      total += s[i] < kSeriesBelow ? (p[i] + q[i]) * 0.5 * s[i] * ratio[i] : p[i] * a + q[i] * b;
      if constexpr (with_slopes) {
        store(a * 0.5, slope_p + at);
        store(b * 0.5, slope_q + at);
      }
    });
  }
  const double value = 0.5 * sum_of<double>(total);
  return value < 0 ? 0.0 : value;
}

double divergence(
    const double* p,
    const double* q,
    const double* log_p,
    const double* log_q,
    int64_t length,
    double* slope_p,
    double* slope_q) {
  return slope_p != nullptr ? divergence_of<true>(p, q, log_p, log_q, length, slope_p, slope_q)
                            : divergence_of<false>(p, q, log_p, log_q, length, nullptr, nullptr);
}

double bias(
    const double* p_row,
    const double* q_row,
    const double* v_p,
    const double* v_q,
    int64_t length,
    double* slope,
    double* inverse) {
  Doubles total{};
  for (int64_t i = 0; i < length; i += kLane) {
    const Doubles m = (load(p_row + i) + load(q_row + i)) * 0.5;
    // An expert that neither domain uses has no variance either.
    const Doubles r = m < kSmallest ? Doubles{} : 0.125 / m;
    const Doubles term = (load(v_p + i) + load(v_q + i)) * r;
    total += term;
    store(term * r * -4.0, slope + i); // d(r)/dp = -r / (2 m) = -4 r²
    store(r, inverse + i);
  }
  return sum_of<double>(total);
}

void add_scaled(double scale, const double* x, int64_t length, double* out) {
  for (int64_t i = 0; i < length; i += kLane) {
    store(load(out + i) + load(x + i) * scale, out + i);
  }
}

} // namespace

extern const ExpertDivergenceLoops expert_divergence_loops = {log_means, divergence, bias, add_scaled};

} // namespace edl::cpu::EDL_ISA
