// sequence_segment_ids on the CPU: labels [B] → ids [T]. Cost: one write of ids.
#include "ops/sequence_segment_ids.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "common/tensors.h"
#include "cpu/indices.h"

namespace edl::cpu {
namespace {

at::Tensor sequence_segment_ids_cpu(const at::Tensor& labels, int64_t num_tokens) {
  check_sequence_segment_ids(labels, num_tokens);
  check_memory("edl::sequence_segment_ids", labels);
  const at::Tensor dense = labels.contiguous();
  const Indices label(dense);
  const int64_t batch = labels.size(0);
  const int64_t length = num_tokens / std::max<int64_t>(batch, 1);
  at::Tensor ids = at::empty({batch * length}, labels.options().dtype(at::kInt));
  auto* out = ids.mutable_data_ptr<int32_t>();
  for (int64_t b = 0; b < batch; ++b) {
    std::fill_n(out + b * length, length, label[b] == -1 ? -1 : static_cast<int32_t>(b));
  }
  return ids;
}

} // namespace
} // namespace edl::cpu

TORCH_LIBRARY_IMPL(edl, CPU, m) {
  m.impl("sequence_segment_ids", edl::cpu::sequence_segment_ids_cpu);
}
