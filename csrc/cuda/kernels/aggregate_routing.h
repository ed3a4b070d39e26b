#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/score_function.h"
#include "cuda/kernels/storage.h"

namespace edl::cuda {

struct RoutingLayer {
  const void* routing; //      [T, E], storage type, entries of a row side by side
  int64_t row_stride; //       elements
  void* grad_routing = nullptr; // [T, E] contiguous, storage type; of the backward pass
};

struct AggregateRoutingTask {
  const RoutingLayer* layers; // [L], on the host
  int64_t num_layers; //       L, at least 1
  StorageType storage;
  const void* segment_ids; //  [T] int32 or int64
  bool ids_are_64_bit;
  int64_t num_tokens; //       T, at least 1
  int64_t num_experts; //      E, at least 1
  int64_t num_segments; //     S, in [1, 2^31)
  Scores scores;
  void* scratch; //            aggregate_routing_scratch_bytes(...), aligned to 16 bytes
  void* sums; //               [L, S, E], accumulation type
  void* counts; //             [S], accumulation type
};

int64_t aggregate_routing_scratch_bytes(
    int64_t num_tokens, int64_t num_experts, int64_t num_segments, int64_t num_layers, StorageType storage);
void launch_aggregate_routing(const AggregateRoutingTask& task, cudaStream_t stream);

struct AggregateRoutingGradient {
  const void* grad_sums; //    [L, S, E], accumulation type
  const RoutingLayer* layers; // [L], on the host; routing is not read without scores
  int64_t num_layers; //       L, at least 1
  const void* segment_ids; //  [T] int32 or int64
  bool ids_are_64_bit;
  StorageType storage;
  int64_t num_tokens; //       T, at least 1
  int64_t num_experts; //      E, at least 1
  int64_t num_segments; //     S
  Scores scores;
};

void launch_aggregate_routing_backward(const AggregateRoutingGradient& gradient, cudaStream_t stream);

} // namespace edl::cuda
