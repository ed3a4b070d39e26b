#include "cuda/expert_products.h"

#include <ATen/ops/_grouped_mm.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>

#include "common/errors.h"
#include "cuda/device.h"
#include "cuda/kernels/expert_mlp.h"
#include "ops/expert_mlp.h"

namespace edl::cuda {
namespace {

constexpr int64_t kMostGroups = 1023; // of at::_grouped_mm

constexpr int64_t kPack = 8; // elements of bfloat16 in 16 bytes

int compute_capability(const at::Device& device) {
  int major = 0;
  const bool found = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device.index()) == cudaSuccess;
  return found ? major : 0;
}

// Sizes may be symbolic, and a device's index still open.
bool one_kernel_serves_all(const at::Tensor& gate_up, const at::Tensor& down) {
  const auto most_groups = gate_up.sym_size(0).maybe_as_int();
  const auto hidden_size = down.sym_size(1).maybe_as_int(), intermediate_size = down.sym_size(2).maybe_as_int();
  if (gate_up.scalar_type() != at::kBFloat16 || !most_groups || !hidden_size || !intermediate_size) {
    return false;
  }
  const at::Device device = gate_up.device();
  const int major =
      compute_capability(device.has_index() ? device : c10::Device(c10::kCUDA, c10::cuda::current_device()));
  return *most_groups <= kMostGroups && *hidden_size % kPack == 0 && *intermediate_size % kPack == 0 &&
      (major == 9 || major == 10);
}

bool products_wait(const at::Tensor& gate_up, const at::Tensor& down) {
  return !one_kernel_serves_all(gate_up, down);
}

[[maybe_unused]] const bool kIsKnown = (tell_whether_products_wait(products_wait), true);

std::vector<int64_t> read_on_host(const at::Tensor& offsets) {
  const at::Tensor copy = offsets.cpu();
  const auto* data = copy.const_data_ptr<int32_t>();
  return {data, data + copy.numel()};
}

} // namespace

ExpertProducts::ExpertProducts(
    const char* op, const at::Tensor& offsets, const at::Tensor& gate_up, const at::Tensor& down)
    : op_(op), offsets_(offsets), grouped_(one_kernel_serves_all(gate_up, down)) {
  if (grouped_) {
    return;
  }
  constexpr const char* kRule =
      "only where one kernel serves all of them: bfloat16, compute capability 9 or 10, H and I multiples of 8, fewer "
      "than 1024 experts (got ";
  const int major = compute_capability(gate_up.device());
  EDL_ENSURE(
      !is_capturing(), op, ": a CUDA graph can capture the experts ", kRule, gate_up.scalar_type(), ", capability ",
      major, ", H = ", down.size(1), ", I = ", down.size(2), ", E = ", down.size(0), ")");
  TORCH_WARN_ONCE(
      op, ": the host need not wait for the device, nor start a product for each expert, ", kRule,
      gate_up.scalar_type(), ", capability ", major, ", H = ", down.size(1), ", I = ", down.size(2),
      ", E = ", down.size(0), ")");
  bounds_ = read_on_host(offsets);
}

at::Tensor ExpertProducts::dense(const at::Tensor& parameter) const {
  const at::Tensor dense = parameter.contiguous();
  if (!grouped_ || is_aligned_to_16(dense.const_data_ptr())) {
    return dense;
  }
  TORCH_WARN_ONCE(
      op_, ": the experts' weights should begin at multiples of 16 bytes, or are copied in each pass (got ",
      reinterpret_cast<std::uintptr_t>(dense.const_data_ptr()) % 16, " bytes behind one)");
  return dense.clone();
}

at::Tensor ExpertProducts::by_row(const at::Tensor& rows, const at::Tensor& matrices) const {
  if (grouped_) {
    return at::_grouped_mm(rows, matrices, offsets_.narrow(0, 1, num_experts()));
  }
  at::Tensor result = at::empty({rows.size(0), matrices.size(2)}, rows.options());
  for (int64_t e = 0; e < num_experts(); ++e) {
    const int64_t count = bounds_[e + 1] - bounds_[e];
    if (count > 0) {
      at::Tensor out = result.narrow(0, bounds_[e], count);
      at::mm_out(out, rows.narrow(0, bounds_[e], count), matrices.select(0, e));
    }
  }
  return result;
}

at::Tensor ExpertProducts::by_expert(const at::Tensor& left, const at::Tensor& right) const {
  if (grouped_) {
    at::Tensor result = at::_grouped_mm(left.t(), right, offsets_.narrow(0, 1, num_experts()));
    // An expert without rows is a sum over nothing, which not every kernel writes.
    launch_zero_unused(
        result.mutable_data_ptr(), num_experts(), result.stride(0) * result.element_size(),
        offsets_.const_data_ptr<int32_t>(), stream_of(result));
    return result;
  }
  at::Tensor result = at::empty({num_experts(), left.size(1), right.size(1)}, left.options());
  for (int64_t e = 0; e < num_experts(); ++e) {
    const int64_t count = bounds_[e + 1] - bounds_[e];
    at::Tensor out = result.select(0, e);
    if (count > 0) {
      at::mm_out(out, left.narrow(0, bounds_[e], count).t(), right.narrow(0, bounds_[e], count));
    } else {
      out.zero_();
    }
  }
  return result;
}

} // namespace edl::cuda
