// token_gram on the CPU: rows [N, H], weights [T, K] or none, row_order [N] → gram [T, K, K].
//
// Each token is one thread's, computed in float32 (float64 for float64). Scratch O(N), and 512 columns of a token's rows
// per thread.
#include "ops/token_gram.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "common/dtypes.h"
#include "common/tensors.h"
#include "cpu/row_order.h"
#include "cpu/token_gram.h"

namespace edl::cpu {
namespace {

constexpr const char* kOp = "edl::token_gram";
constexpr int64_t kGrainOperations = 1 << 17; // work below this is not worth a thread

template <typename Loop, typename Task>
void run(Loop loop, const Task& task, int64_t num_tokens) {
  const int64_t top_k = task.tokens.top_k;
  const int64_t operations = std::max<int64_t>(1, top_k * top_k * task.tokens.width);
  const int64_t grain = std::max<int64_t>(1, kGrainOperations / operations);
  at::parallel_for(0, num_tokens, grain, [&](int64_t begin, int64_t end) {
    std::vector<char> own(token_gram_bytes(top_k));
    loop(task, begin, end, own.data());
  });
}

// The arguments of one call, dense, and checked by their values.
struct Arguments {
  Arguments(
      const at::Tensor& all_rows,
      const std::optional<at::Tensor>& all_weights,
      const at::Tensor& row_order,
      int64_t top_k)
      : rows(with_dense_rows(all_rows)),
        order(row_order.contiguous()),
        row_of_slot(rows_of_slots(kOp, order.const_data_ptr<int32_t>(), order.size(0))),
        weights(dense_if(all_weights, accumulation_type(rows.scalar_type()))) {
    tokens = {
        .rows = rows.const_data_ptr(),
        .rows_stride = rows.stride(0),
        .are_gate_and_up = false,
        .row_of_slot = row_of_slot.data(),
        .num_used = order.size(0),
        .weights = data_if(weights),
        .top_k = top_k,
        .width = rows.size(1)};
  }

  at::Tensor rows;
  at::Tensor order;
  std::vector<int32_t> row_of_slot;
  at::Tensor weights;
  TokenRows tokens;
};

at::Tensor token_gram_cpu(
    const at::Tensor& rows, const std::optional<at::Tensor>& weights, const at::Tensor& row_order, int64_t top_k) {
  check_token_gram(rows, weights, row_order, top_k);
  check_memory(kOp, rows, weights, row_order);
  const Arguments arguments(rows, weights, row_order, top_k);
  return grams_of(arguments.tokens, storage_of(rows), rows.size(0) / top_k, rows.options());
}

at::Tensor token_gram_backward_cpu(
    const at::Tensor& grad_gram,
    const at::Tensor& rows,
    const std::optional<at::Tensor>& weights,
    const at::Tensor& row_order,
    int64_t top_k) {
  check_token_gram_backward(grad_gram, rows, weights, row_order, top_k);
  check_memory(kOp, grad_gram, rows, weights, row_order);
  const Arguments arguments(rows, weights, row_order, top_k);
  const at::Tensor grad = grad_gram.contiguous();
  at::Tensor grad_rows = at::empty(rows.sizes(), rows.options().memory_format(at::MemoryFormat::Contiguous));
  spread_grams(
      {.tokens = arguments.tokens,
       .grad_gram = grad.const_data_ptr(),
       .grad_output = nullptr,
       .grad_output_stride = 0,
       .grad_weights = nullptr,
       .grad_rows = grad_rows.mutable_data_ptr(),
       .is_accumulated = false},
      storage_of(rows), rows.size(0) / top_k);
  return grad_rows;
}

} // namespace

at::Tensor grams_of(
    const TokenRows& tokens, StorageType storage, int64_t num_tokens, const at::TensorOptions& options) {
  const auto type = accumulation_type(c10::typeMetaToScalarType(options.dtype()));
  at::Tensor gram = at::empty({num_tokens, tokens.top_k, tokens.top_k}, options.dtype(type));
  run(token_gram_loops().gram[static_cast<int>(storage)], TokenGramTask{tokens, gram.mutable_data_ptr()}, num_tokens);
  return gram;
}

void spread_grams(const TokenGramGradient& gradient, StorageType storage, int64_t num_tokens) {
  run(token_gram_loops().spread[static_cast<int>(storage)], gradient, num_tokens);
}

} // namespace edl::cpu

TORCH_LIBRARY_IMPL(edl, CPU, m) {
  m.impl("token_gram", edl::cpu::token_gram_cpu);
  m.impl("_token_gram_backward", edl::cpu::token_gram_backward_cpu);
}
