// dispatch_tokens on CUDA, host side; the kernel stands in kernels/rows.cu. A slot that row_order does not name becomes
// NaN where the CPU raises.
#include "ops/dispatch_tokens.h"

#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "cuda/device.h"
#include "cuda/rows.h"

namespace edl::cuda {
namespace {

constexpr const char* kOp = "edl::dispatch_tokens";

at::Tensor dispatch_tokens_cuda(const at::Tensor& tokens, const at::Tensor& row_order, int64_t top_k) {
  check_dispatch_tokens(tokens, row_order, top_k);
  const c10::cuda::CUDAGuard guard(tokens.device());
  if (values_are_checked(kOp)) {
    dispatch_tokens(at::zeros({tokens.size(0), 1}), row_order.cpu(), top_k);
  }
  const at::Tensor rows = gather_rows(tokens, row_order.contiguous(), top_k, nullptr);
  check_launch(kOp);
  return rows;
}

} // namespace
} // namespace edl::cuda

TORCH_LIBRARY_IMPL(edl, CUDA, m) {
  m.impl("dispatch_tokens", edl::cuda::dispatch_tokens_cuda);
}
