#pragma once

#include <cstdint>

#include "common/storage_type.h"
#include "cpu/isa/dispatch.h"

namespace edl {

// What a pass saw of its rows, to tell logits from probabilities.
struct RowCensus {
  int64_t finite = 0; //         rows without NaN and infinity
  int64_t distributions = 0; //  of these: no entry below 0, sum within the tolerance of 1
  int64_t first_other = -1; //   the first finite row that is no distribution
};

// Rows `order[begin..end)` of routing, or rows begin..end themselves where order is null.
struct RoutingRows {
  const void* data; //      [T, E], storage type
  int64_t row_stride; //    elements
  int64_t num_experts; //   E
  const int32_t* order; //  [T] or null
  int64_t begin;
  int64_t end;
};

struct RoutingGradient {
  const void* grad_sums; //       [S, E], accumulation type
  const void* segment_ids; //     [T]
  bool ids_are_64_bit;
  const void* routing; //         [T, E], storage type; not read without scores
  int64_t row_stride; //          elements
  int64_t num_experts; //         E
  void* grad_routing; //          [T, E] contiguous, storage type
  bool past_caches; //            the output is larger than the caches
};

// Indexed by storage and by score (softmax, sigmoid, none).
struct AggregateRoutingLoops {
  // sums[e] = sum of score(row)[e] over the rows, in their order.
  void (*sum_rows[4][3])(const RoutingRows& rows, double tolerance, void* sums, RowCensus* census);
  // Rows begin..end of the gradient; row t is that of segment_ids[t] through the score, zero where the id is -1.
  void (*spread_rows[4][3])(const RoutingGradient& gradient, int64_t begin, int64_t end);
};

EDL_ISA_LOOPS(AggregateRoutingLoops, aggregate_routing_loops)

} // namespace edl
