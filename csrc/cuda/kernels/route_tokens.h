#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/score_function.h"
#include "cuda/kernels/storage.h"

namespace edl::cuda {

// More experts than this do not fit the shared memory of a block.
int64_t most_experts_to_route(StorageType storage);

struct RouteTask {
  const void* logits; //      [T, E], storage type, entries of a row side by side
  StorageType storage;
  int64_t row_stride; //      elements
  int64_t num_tokens; //      T, at least 1
  int64_t num_experts; //     E, at least 1
  int64_t top_k; //           K, in [1, E]
  Scores scores; //           of a router
  const void* bias; //        [E] accumulation type, or null
  const uint8_t* allowed; //  [T, E] of booleans, or null: all are
  int64_t allowed_stride; //  of its rows
  const void* given; //       [T, K] ids that take the place of a choice, or null
  bool given_are_64_bit;
  bool normalize;
  double scale;
  void* weights; //           [T, K] accumulation type
  int64_t* experts; //        [T, K]
};

void launch_route_tokens(const RouteTask& task, cudaStream_t stream);

struct RouteGradient {
  const void* grad_weights; // [T, K] accumulation type
  const void* logits; //       [T, E], storage type
  StorageType storage;
  int64_t row_stride; //       elements
  int64_t num_tokens; //       T, at least 1
  int64_t num_experts; //      E
  int64_t top_k; //            K
  const void* experts; //      [T, K] ids, in [0, E) unless they were given
  bool experts_are_64_bit; //  as those that were not given are
  bool given;
  const uint8_t* allowed; //   [T, E] of booleans, or null: all are
  int64_t allowed_stride; //   of its rows
  Scores scores;
  bool normalize;
  double scale;
  void* grad_logits; //        [T, E] contiguous, storage type
};

void launch_route_tokens_backward(const RouteGradient& gradient, cudaStream_t stream);

} // namespace edl::cuda
