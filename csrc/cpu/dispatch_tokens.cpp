// dispatch_tokens on the CPU: tokens [T, H], row_order [N] → rows [N, H]. A gather of rows; no arithmetic.
#include "ops/dispatch_tokens.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>

#include "common/tensors.h"
#include "cpu/row_order.h"

namespace edl::cpu {
namespace {

constexpr const char* kOp = "edl::dispatch_tokens";
constexpr int64_t kGrainBytes = 1 << 16; // copies below this are not worth a thread

at::Tensor dispatch_tokens_cpu(const at::Tensor& tokens, const at::Tensor& row_order, int64_t top_k) {
  check_dispatch_tokens(tokens, row_order, top_k);
  check_memory(kOp, tokens, row_order);
  const at::Tensor source = with_dense_rows(tokens);
  const at::Tensor order = row_order.contiguous();
  const auto* slots = order.const_data_ptr<int32_t>();
  const int64_t num_rows = order.size(0);
  rows_of_slots(kOp, slots, num_rows);
  at::Tensor rows = at::empty({num_rows, tokens.size(1)}, tokens.options());
  const auto* from = static_cast<const char*>(source.const_data_ptr());
  auto* to = static_cast<char*>(rows.mutable_data_ptr());
  const int64_t width = tokens.size(1) * tokens.element_size();
  const int64_t stride = source.stride(0) * tokens.element_size();
  at::parallel_for(
      0, num_rows, std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, width)), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          std::memcpy(to + i * width, from + slots[i] / top_k * stride, width);
        }
      });
  return rows;
}

} // namespace
} // namespace edl::cpu

TORCH_LIBRARY_IMPL(edl, CPU, m) {
  m.impl("dispatch_tokens", edl::cpu::dispatch_tokens_cpu);
}
