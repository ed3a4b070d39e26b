#include "cuda/device.h"

#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <string_view>

#include "common/errors.h"

namespace edl::cuda {

int64_t layers_of(const at::Tensor& tensor) {
  int64_t layers = 1;
  for (int64_t i = 0; i + 2 < tensor.dim(); ++i) {
    layers *= tensor.size(i);
  }
  return layers;
}

bool is_capturing() {
  return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
}

bool values_are_checked(std::string_view op) {
  const char* wanted = std::getenv("EDL_CHECK");
  if (wanted == nullptr || std::string_view(wanted) != "1") {
    return false;
  }
  EDL_ENSURE(
      !is_capturing(), op,
      ": EDL_CHECK=1 reads values on the host, which a CUDA graph cannot capture (got a stream that is being captured; "
      "unset "
      "EDL_CHECK)");
  return true;
}

void check_launch(std::string_view op) {
  const cudaError_t error = cudaGetLastError();
  TORCH_CHECK(
      error == cudaSuccess, op,
      ": its kernels must be launched, and no CUDA error of another library may be waiting to be asked for (got ",
      cudaGetErrorString(error), ")");
}

} // namespace edl::cuda
