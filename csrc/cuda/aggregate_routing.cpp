// aggregate_routing on CUDA, host side: memory and launches; the kernels' plan stands in kernels/aggregate_routing.cu.
#include "ops/aggregate_routing.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <limits>
#include <vector>

#include "common/dtypes.h"
#include "common/errors.h"
#include "cuda/device.h"
#include "cuda/kernels/aggregate_routing.h"

namespace edl::cuda {
namespace {

// The rows of every layer as the kernels read them; kept alive while the kernels are enqueued.
struct DenseLayers {
  explicit DenseLayers(at::TensorList layers) {
    for (const at::Tensor& routing : layers) {
      rows.push_back(with_dense_rows(routing));
      views.push_back({.routing = rows.back().const_data_ptr(), .row_stride = rows.back().stride(0)});
    }
  }

  std::vector<at::Tensor> rows;
  std::vector<RoutingLayer> views;
};

// All of one shape, type and device: sums [L, S, E], counts [S].
std::tuple<at::Tensor, at::Tensor> aggregate(
    at::TensorList layers,
    const at::Tensor& segment_ids,
    int64_t num_segments,
    std::string_view scores_name,
    std::string_view op) {
  const at::Tensor& routing = layers[0];
  const Scores scores = check_aggregate_routing(op, routing, segment_ids, num_segments, scores_name);
  EDL_ENSURE(
      num_segments < std::numeric_limits<int32_t>::max(), op, ": on CUDA num_segments must be below 2^31 - 1 (got ",
      num_segments, ")");
  const c10::cuda::CUDAGuard guard(routing.device());
  if (values_are_checked(op)) {
    for (const at::Tensor& layer : layers) {
      aggregate_routing_for(layer.cpu(), segment_ids.cpu(), num_segments, scores_name, op);
    }
  }
  const auto options = routing.options().dtype(accumulation_type(routing.scalar_type()));
  const auto num_layers = static_cast<int64_t>(layers.size());
  const int64_t num_tokens = routing.size(0);
  const int64_t num_experts = routing.size(1);
  if (num_tokens == 0 || num_segments == 0) {
    return {at::zeros({num_layers, num_segments, num_experts}, options), at::zeros({num_segments}, options)};
  }
  const DenseLayers dense(layers);
  const at::Tensor ids = segment_ids.contiguous();
  const StorageType storage = storage_of(routing);
  at::Tensor sums = at::empty({num_layers, num_segments, num_experts}, options);
  at::Tensor counts = at::empty({num_segments}, options);
  at::Tensor scratch = at::empty(
      {aggregate_routing_scratch_bytes(num_tokens, num_experts, num_segments, num_layers, storage)},
      routing.options().dtype(at::kByte));
  launch_aggregate_routing(
      {.layers = dense.views.data(),
       .num_layers = num_layers,
       .storage = storage,
       .segment_ids = ids.const_data_ptr(),
       .ids_are_64_bit = ids.scalar_type() == at::kLong,
       .num_tokens = num_tokens,
       .num_experts = num_experts,
       .num_segments = num_segments,
       .scores = scores,
       .scratch = scratch.mutable_data_ptr(),
       .sums = sums.mutable_data_ptr(),
       .counts = counts.mutable_data_ptr()},
      stream_of(routing));
  check_launch(op);
  return {sums, counts};
}

// grad_sums [L, S, E] → the gradient of each layer.
std::vector<at::Tensor> spread(
    const at::Tensor& grad_sums,
    at::TensorList layers,
    const at::Tensor& segment_ids,
    std::string_view scores_name,
    std::string_view op) {
  const at::Tensor& routing = layers[0];
  const Scores scores = check_aggregate_routing_backward(op, grad_sums.select(0, 0), routing, segment_ids, scores_name);
  const c10::cuda::CUDAGuard guard(routing.device());
  DenseLayers dense(layers);
  std::vector<at::Tensor> gradients;
  for (RoutingLayer& view : dense.views) {
    gradients.push_back(at::empty(routing.sizes(), routing.options().memory_format(at::MemoryFormat::Contiguous)));
    view.grad_routing = gradients.back().mutable_data_ptr();
  }
  if (gradients[0].numel() == 0) {
    return gradients;
  }
  const at::Tensor grad = grad_sums.contiguous();
  const at::Tensor ids = segment_ids.contiguous();
  launch_aggregate_routing_backward(
      {.grad_sums = grad.const_data_ptr(),
       .layers = dense.views.data(),
       .num_layers = static_cast<int64_t>(layers.size()),
       .segment_ids = ids.const_data_ptr(),
       .ids_are_64_bit = ids.scalar_type() == at::kLong,
       .storage = storage_of(routing),
       .num_tokens = routing.size(0),
       .num_experts = routing.size(1),
       .num_segments = grad.size(1),
       .scores = scores},
      stream_of(routing));
  check_launch(op);
  return gradients;
}

std::tuple<at::Tensor, at::Tensor> aggregate_routing_cuda(
    const at::Tensor& routing,
    const at::Tensor& segment_ids,
    int64_t num_segments,
    std::string_view scores_name,
    std::string_view op) {
  auto [sums, counts] = aggregate(routing, segment_ids, num_segments, scores_name, op);
  return {sums.squeeze(0), counts};
}

at::Tensor aggregate_routing_backward_cuda(
    const at::Tensor& grad_sums,
    const at::Tensor& routing,
    const at::Tensor& segment_ids,
    std::string_view scores_name,
    std::string_view op) {
  return spread(grad_sums.unsqueeze(0), routing, segment_ids, scores_name, op)[0];
}

std::tuple<at::Tensor, at::Tensor> aggregate_layers_cuda(
    at::TensorList layers,
    const at::Tensor& segment_ids,
    int64_t num_segments,
    std::string_view scores,
    std::string_view op) {
  check_layers_alike(op, layers);
  return aggregate(layers, segment_ids, num_segments, scores, op);
}

std::vector<at::Tensor> aggregate_layers_backward_cuda(
    const at::Tensor& grad_sums,
    at::TensorList layers,
    const at::Tensor& segment_ids,
    std::string_view scores,
    std::string_view op) {
  check_layers_alike(op, layers);
  EDL_ENSURE(
      grad_sums.dim() == 3 && grad_sums.size(0) == static_cast<int64_t>(layers.size()), op,
      ": the gradient of sums must have one matrix per layer (got ", grad_sums.sizes(), " for ", layers.size(),
      " layers)");
  return spread(grad_sums, layers, segment_ids, scores, op);
}

} // namespace
} // namespace edl::cuda

TORCH_LIBRARY_IMPL(edl, CUDA, m) {
  m.impl("aggregate_routing", edl::cuda::aggregate_routing_cuda);
  m.impl("_aggregate_routing_backward", edl::cuda::aggregate_routing_backward_cuda);
  m.impl("_aggregate_layers", edl::cuda::aggregate_layers_cuda);
  m.impl("_aggregate_layers_backward", edl::cuda::aggregate_layers_backward_cuda);
}
