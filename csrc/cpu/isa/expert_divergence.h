#pragma once

#include <cstdint>

#include "cpu/isa/dispatch.h"

namespace edl::cpu {

// Every row is padded with zeros to this many doubles, so that no loop has a tail.
inline constexpr int64_t kRowPadding = 8;

// log(2^-126): where a probability is zero, its log ratio to the mean of the pair is taken to be this.
inline constexpr double kLowestLogRatio = -87.33654475055310;

struct ExpertDivergenceLoops {
  // out[i] = log of means[i] (of the smallest normal number where it is smaller); NaN for a negative or NaN mean.
  void (*log_means)(const double* means, int64_t length, double* out);
  // Jensen-Shannon divergence of p and q, and its slopes dD/dp, dD/dq where these are wanted (not null).
  double (*divergence)(
      const double* p,
      const double* q,
      const double* log_p,
      const double* log_q,
      int64_t length,
      double* slope_p,
      double* slope_q);
  // b = 1/8 Σ (v_p + v_q) / m with m = (p + q)/2, its slope db/dp = db/dq, and db/dv = inverse = 1/(8 m).
  double (*bias)(
      const double* p,
      const double* q,
      const double* v_p,
      const double* v_q,
      int64_t length,
      double* slope,
      double* inverse);
  // out += scale * x.
  void (*add_scaled)(double scale, const double* x, int64_t length, double* out);
};

EDL_ISA_LOOPS(ExpertDivergenceLoops, expert_divergence_loops)

} // namespace edl::cpu
