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
  const void* bias; //        [E] accumulation type, or null
  bool normalize;
  double scale;
  void* weights; //           [T, K] accumulation type
  int64_t* experts; //        [T, K]
};

struct RouteGradient {
  const void* grad_weights; // [T, K] accumulation type
  const void* logits; //       [T, E], storage type
  int64_t row_stride; //       elements
  int64_t num_experts; //      E
  int64_t top_k; //            K
  const int64_t* experts; //   [T, K], in [0, E)
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
