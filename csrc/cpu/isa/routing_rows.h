#pragma once

#include <cstdint>

namespace edl::cpu {

// What a pass saw of its rows, to tell logits from probabilities.
struct RowCensus {
  int64_t finite = 0; //         rows without NaN and infinity
  int64_t distributions = 0; //  of these: no entry below 0, sum within the tolerance of 1
  int64_t first_other = -1; //   the first finite row that is no distribution
};

// Row i is that of `order[i]` in routing, or i itself where order is null.
struct RoutingRows {
  const void* data; //      [T, E], storage type
  int64_t row_stride; //    elements
  int64_t num_experts; //   E
  const int32_t* order; //  [T] or null
};

} // namespace edl::cpu
