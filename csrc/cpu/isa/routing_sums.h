#pragma once

#include <cstdint>

#include "common/score_function.h"
#include "common/storage_type.h"
#include "cpu/isa/dispatch.h"
#include "cpu/isa/routing_rows.h"

namespace edl::cpu {

// Rows begin..end of a segment, and what they add up to.
struct ScoredPiece {
  int64_t begin;
  int64_t end;
  double* mass; //     [E], of the scores
  double entropy; //   of each row's, nats
  double margin; //    of the K-th highest to the next; 0 where K = E
  RowCensus* census;
};

// Indexed by storage and by score.
struct RoutingSumsLoops {
  void (*sum_piece[kStorageTypes][kAllScores])(
      const RoutingRows& rows, int64_t top_k, double tolerance, ScoredPiece* piece);
};

EDL_ISA_LOOPS(RoutingSumsLoops, routing_sums_loops)

} // namespace edl::cpu
