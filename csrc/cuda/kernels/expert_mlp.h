#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/kernels/storage.h"

namespace edl::cuda {

struct RowCheck {
  const int32_t* offsets; //   [E + 1]
  const int32_t* row_order; // [N]
  int32_t num_experts; //      E
  int32_t num_rows; //         N, at least 1
  int32_t* checked_offsets; // [E + 1]
  int32_t* checked_order; //   [N]
};

// Copies both where the offsets rise from 0 to at most N. Else each offset is brought between the one before it and N,
// and the order names no slot, so that every token becomes NaN and no product leaves its memory.
void launch_check_rows(const RowCheck& check, cudaStream_t stream);

struct SwigluTask {
  void* pre_activation; //     [N, 2I] contiguous, first the gate's I columns; rows without an expert become zeros
  StorageType storage;
  int64_t num_rows; //         N, at least 1
  const int32_t* num_used; //  on the device: rows from here on have no expert
  int64_t width; //            I, at least 1
  void* activation; //         [N, I]
};

// activation = silu(gate) * up.
void launch_swiglu(const SwigluTask& task, cudaStream_t stream);

struct SwigluGradient {
  const void* pre_activation; //   [N, 2I] contiguous
  const void* grad_activation; //  [N, I], before the weights
  StorageType storage;
  const int32_t* row_order; //     [N]
  const void* weights; //          [T, K] accumulation type
  int64_t num_rows; //             N, at least 1
  const int32_t* num_used; //      on the device
  int64_t width; //                I, at least 1
  void* activation; //             [N, I]: weight · silu(gate) * up
  void* grad_pre_activation; //    [N, 2I], with the weights
  void* grad_weights; //           [T, K] accumulation type: <grad_activation, silu(gate) * up>
  const void* more = nullptr; //   [N, I]: further gradient of the activation, which the weights do not scale; or null
};

// Rows without an expert become zeros, their grad_weights too. Slots that row_order does not name keep what
// grad_weights holds.
void launch_swiglu_backward(const SwigluGradient& gradient, cudaStream_t stream);

// Zeros matrices[e] where expert e has no rows. matrix_bytes is a multiple of 16.
void launch_zero_unused(
    void* matrices, //          [E, matrix_bytes]
    int64_t num_experts,
    int64_t matrix_bytes,
    const int32_t* offsets, //  [E + 1]
    cudaStream_t stream);

} // namespace edl::cuda
