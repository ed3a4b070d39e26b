#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace edl::cuda {

// Segments and their labels, as both directions read them.
struct LabelledSegments {
  const void* sums; //         [L, S, E] float32 or float64
  const void* counts; //       [L, S] or [S], of the same type
  bool are_float64;
  bool counts_are_shared; //   counts is [S]
  const void* labels; //       [S] int32 or int64, or [S, D] float64
  bool labels_are_64_bit;
  bool labels_are_weights;
  int64_t num_layers; //       L
  int64_t num_segments; //     S
  int64_t num_domains; //      D, at least 1
  int64_t num_experts; //      E
};

void launch_domain_moments(
    const LabelledSegments& segments,
    double* sums, //    [L, D, E]
    double* squares, // [L, D, E] or null
    double* counts, //  [L, D]
    cudaStream_t stream);

void launch_domain_moments_backward(
    const LabelledSegments& segments,
    const double* grad_sums, //    [L, D, E]
    const double* grad_squares, // [L, D, E] or null
    void* grad_segment_sums, //    [L, S, E], the type of the sums
    cudaStream_t stream);

} // namespace edl::cuda
