#pragma once

// What the host side of every CUDA operator shares. No operator waits for the device, except to check values where
// EDL_CHECK=1 asks for it.

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <string_view>

#include "common/tensors.h"

namespace edl::cuda {

// The current stream of a tensor's device.
inline cudaStream_t stream_of(const at::Tensor& tensor) {
  return c10::cuda::getCurrentCUDAStream(tensor.device().index()).stream();
}

// Leading dimensions of [..., *, *] folded into one.
int64_t layers_of(const at::Tensor& tensor);

// Whether the current stream is being captured into a CUDA graph, so that the host cannot wait for the device.
bool is_capturing();

// Whether EDL_CHECK=1 asks for the checks of values that the CPU makes. Refused while a graph is captured: on the
// current stream of the current device, which must be the one of the op's tensors.
bool values_are_checked(std::string_view op);

// Raises what went wrong in launching the kernels of an op, or earlier: CUDA keeps an error until somebody asks.
void check_launch(std::string_view op);

} // namespace edl::cuda
