#pragma once

// Rows of a routing in the loops that sum them. No torch header, no external linkage.

#include <cmath>
#include <limits>

#include "cpu/isa/routing_rows.h"
#include "cpu/isa/simd.h"

namespace edl::cpu::EDL_ISA {
namespace {

inline void count_row(double sum, bool negative, double tolerance, int64_t row, RowCensus* census) {
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

} // namespace
} // namespace edl::cpu::EDL_ISA
