#pragma once

#include <cstdint>

#include "common/score_function.h"
#include "common/storage_type.h"
#include "cpu/isa/dispatch.h"

namespace edl::cpu {

// "Accumulation type": float, or double for double logits.
struct RouteTask {
  const void* logits; //      [T, E], storage type
  int64_t row_stride; //      elements
  int64_t num_experts; //     E
  int64_t top_k; //           K
  const void* bias; //        [E] accumulation type, or null; null where `given`
  const uint8_t* allowed; //  [T, E], or null: all are
  int64_t allowed_stride; //  of its rows
  bool given; //              whether `experts` are, in [0, E], where E is none, of weight 0
  bool normalize;
  double scale;
  void* weights; //           [T, K] accumulation type
  int64_t* experts; //        [T, K]; of a token given or chosen they differ, and are allowed
};

struct RouteGradient {
  const void* grad_weights; // [T, K] accumulation type
  const void* logits; //       [T, E], storage type
  int64_t row_stride; //       elements
  int64_t num_experts; //      E
  int64_t top_k; //            K
  const int64_t* experts; //   [T, K], in [0, E), or E too where they were given
  const uint8_t* allowed; //   [T, E], or null: all are
  int64_t allowed_stride; //   of its rows
  bool given;
  bool normalize;
  double scale;
  void* grad_logits; //        [T, E] contiguous, storage type
};

// Indexed by storage and by score; rows begin..end.
struct RouteTokensLoops {
  void (*route_rows[kStorageTypes][kRouterScores])(const RouteTask& task, int64_t begin, int64_t end);
  void (*spread_rows[kStorageTypes][kRouterScores])(const RouteGradient& gradient, int64_t begin, int64_t end);
};

EDL_ISA_LOOPS(RouteTokensLoops, route_tokens_loops)

} // namespace edl::cpu
