#pragma once

#include <cstdint>

#include "common/score_function.h"
#include "common/storage_type.h"
#include "cpu/isa/dispatch.h"
#include "cpu/isa/routing_rows.h"

namespace edl::cpu {

// Rows begin..end, and where their sums go.
struct RowPiece {
  int64_t begin;
  int64_t end;
  void* sums; //            [E], accumulation type, zero before
  RowCensus* census;
};

// A plain sum reads this many pieces side by side: what one stream of reads gets from memory is half of what a core can.
inline constexpr int64_t kPiecesAtOnce = 4;

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

// Indexed by storage and by score.
struct AggregateRoutingLoops {
  // Of each piece, at most kPiecesAtOnce: sums[e] = sum of score(row)[e] over its rows, in their order.
  void (*sum_pieces[kStorageTypes][kAllScores])(
      const RoutingRows& rows, const RowPiece* pieces, int64_t num_pieces, double tolerance);
  // Rows begin..end of the gradient; row t is that of segment_ids[t] through the score, zero where the id is -1.
  void (*spread_rows[kStorageTypes][kAllScores])(const RoutingGradient& gradient, int64_t begin, int64_t end);
};

EDL_ISA_LOOPS(AggregateRoutingLoops, aggregate_routing_loops)

} // namespace edl::cpu
