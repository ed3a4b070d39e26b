// route_tokens on the CPU: logits [T, E], bias [E], allowed [T, E] → weights [T, K], experts [T, K].
//
// Rows are independent: one pass over them, computed in float32 (float64 for float64). Scratch: a few rows per thread.
#include "ops/route_tokens.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "common/dtypes.h"
#include "common/errors.h"
#include "common/tensors.h"
#include "cpu/indices.h"
#include "cpu/isa/route_tokens.h"

namespace edl::cpu {
namespace {

constexpr const char* kOp = "edl::route_tokens";
constexpr const char* kBackward = "edl::_route_tokens_backward";
constexpr int64_t kGrainElements = 1 << 14; // work below this is not worth a thread

int64_t grain_rows(int64_t columns) {
  return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, columns));
}

// Which experts each token may take.
struct Allowed {
  explicit Allowed(const std::optional<at::Tensor>& given)
      : rows(given.has_value() ? with_dense_rows(*given) : at::Tensor()),
        data(rows.defined() ? static_cast<const uint8_t*>(rows.const_data_ptr()) : nullptr),
        stride(rows.defined() ? rows.stride(0) : 0) {}

  bool are_all() const {
    return data == nullptr;
  }
  bool has(int64_t token, int64_t expert) const {
    return are_all() || data[token * stride + expert] != 0;
  }
  int64_t count(int64_t token) const {
    const uint8_t* row = data + token * stride;
    return rows.size(1) - std::count(row, row + rows.size(1), 0);
  }

  at::Tensor rows; //      [T, E] bool, or none
  const uint8_t* data; //  null: all
  int64_t stride;
};

// The first of `num_rows` rows that is not as it must be, or num_rows: `find(begin, end)` looks for it in a range.
template <typename Find>
int64_t first_wrong(int64_t num_rows, int64_t grain, const Find& find) {
  std::atomic<int64_t> first{num_rows};
  at::parallel_for(0, num_rows, grain, [&](int64_t begin, int64_t end) {
    const int64_t found = find(begin, end);
    int64_t known = first.load();
    while (found < end && found < known && !first.compare_exchange_weak(known, found)) {
    }
  });
  return first;
}

void check_enough_allowed(const Allowed& allowed, int64_t top_k) {
  const int64_t num_tokens = allowed.rows.size(0);
  const int64_t wrong = first_wrong(num_tokens, grain_rows(allowed.rows.size(1)), [&](int64_t begin, int64_t end) {
    while (begin < end && allowed.count(begin) >= top_k) {
      ++begin;
    }
    return begin;
  });
  EDL_ENSURE_INDEX(
      wrong == num_tokens, kOp, ": allowed must leave each token at least top_k experts (got ", allowed.count(wrong),
      " for token ", wrong, " and top_k ", top_k, ")");
}

// The experts that were given, with E for none.
at::Tensor read_given(const char* op, const at::Tensor& experts, int64_t num_experts, const Allowed& allowed) {
  const at::Tensor dense = experts.contiguous();
  const Indices ids(dense);
  const int64_t num_tokens = dense.size(0), top_k = dense.size(1);
  at::Tensor result = at::empty({num_tokens, top_k}, experts.options().dtype(at::kLong));
  auto* out = result.mutable_data_ptr<int64_t>();
  // The first slot of a token that is wrong, or K. `seen[e]` is the last token that was given expert e.
  const auto wrong_slot = [&](int64_t t, std::vector<int64_t>* seen) {
    for (int64_t k = 0; k < top_k; ++k) {
      const int64_t id = ids[t * top_k + k];
      out[t * top_k + k] = id == -1 ? num_experts : id;
      if (id == -1) {
        continue;
      }
      if (id < 0 || id >= num_experts || (*seen)[id] == t || !allowed.has(t, id)) {
        return k;
      }
      (*seen)[id] = t;
    }
    return top_k;
  };
  const int64_t wrong = first_wrong(num_tokens, grain_rows(top_k), [&](int64_t begin, int64_t end) {
    std::vector<int64_t> seen(num_experts, -1);
    while (begin < end && wrong_slot(begin, &seen) == top_k) {
      ++begin;
    }
    return begin;
  });
  if (wrong < num_tokens) {
    std::vector<int64_t> seen(num_experts, -1);
    const int64_t id = ids[wrong * top_k + wrong_slot(wrong, &seen)];
    EDL_ENSURE_INDEX(
        id >= 0 && id < num_experts, op, ": experts must be at least -1, which means none, and below ", num_experts,
        ", the number of experts (got ", id, " for token ", wrong, ")");
    EDL_ENSURE_INDEX(
        seen[id] != wrong, op, ": experts of a token must differ (got ", id, " twice for token ", wrong, ")");
    EDL_ENSURE_INDEX(false, op, ": experts must be allowed (got ", id, ", which is not, for token ", wrong, ")");
  }
  return result;
}

std::tuple<at::Tensor, at::Tensor> route_tokens_cpu(
    const at::Tensor& logits,
    int64_t top_k,
    std::string_view scores_name,
    const std::optional<at::Tensor>& bias,
    bool normalize,
    double scale,
    const std::optional<at::Tensor>& allowed_experts,
    const std::optional<at::Tensor>& given) {
  const Scores scores = check_route_tokens(logits, top_k, scores_name, bias, allowed_experts, given);
  check_memory(kOp, logits, bias, allowed_experts, given);
  const at::Tensor rows = with_dense_rows(logits);
  const auto type = accumulation_type(logits.scalar_type());
  const bool is_biased = bias.has_value() && !given.has_value();
  const at::Tensor dense_bias = is_biased ? bias->to(type).contiguous() : at::Tensor();
  at::Tensor weights = at::empty({rows.size(0), top_k}, logits.options().dtype(type));
  const Allowed allowed(allowed_experts);
  if (!allowed.are_all() && !given.has_value()) {
    check_enough_allowed(allowed, top_k);
  }
  at::Tensor experts = given.has_value() ? read_given(kOp, *given, rows.size(1), allowed)
                                         : at::empty({rows.size(0), top_k}, logits.options().dtype(at::kLong));
  const RouteTask task{
      rows.const_data_ptr(),
      rows.stride(0),
      rows.size(1),
      top_k,
      dense_bias.defined() ? dense_bias.const_data_ptr() : nullptr,
      allowed.data,
      allowed.stride,
      given.has_value(),
      normalize,
      scale,
      weights.mutable_data_ptr(),
      experts.mutable_data_ptr<int64_t>()};
  const auto route_rows = route_tokens_loops().route_rows[static_cast<int>(storage_of(rows))][static_cast<int>(scores)];
  at::parallel_for(
      0, rows.size(0), grain_rows(rows.size(1)), [&](int64_t begin, int64_t end) { route_rows(task, begin, end); });
  return {weights, experts};
}

at::Tensor route_tokens_backward_cpu(
    const at::Tensor& grad_weights,
    const at::Tensor& logits,
    const at::Tensor& experts,
    std::string_view scores_name,
    bool normalize,
    double scale,
    const std::optional<at::Tensor>& allowed_experts,
    bool given) {
  const Scores scores = check_route_tokens_backward(grad_weights, logits, experts, scores_name, allowed_experts, given);
  check_memory(kOp, grad_weights, logits, experts, allowed_experts);
  const at::Tensor rows = with_dense_rows(logits);
  const at::Tensor dense_grad = grad_weights.contiguous();
  const int64_t num_experts = rows.size(1);
  const Allowed allowed(allowed_experts);
  const at::Tensor dense_experts = given ? read_given(kBackward, experts, num_experts, allowed) : experts.contiguous();
  const int64_t* ids = dense_experts.const_data_ptr<int64_t>();
  EDL_ENSURE_INDEX(
      given || std::all_of(ids, ids + dense_experts.numel(), [=](int64_t id) { return id >= 0 && id < num_experts; }),
      kBackward, ": experts must be at least 0 and below ", num_experts, ", the number of experts");
  at::Tensor grad_logits = at::empty(logits.sizes(), logits.options().memory_format(at::MemoryFormat::Contiguous));
  const RouteGradient gradient{
      dense_grad.const_data_ptr(),
      rows.const_data_ptr(),
      rows.stride(0),
      num_experts,
      experts.size(1),
      ids,
      allowed.data,
      allowed.stride,
      given,
      normalize,
      scale,
      grad_logits.mutable_data_ptr()};
  const auto spread_rows =
      route_tokens_loops().spread_rows[static_cast<int>(storage_of(rows))][static_cast<int>(scores)];
  at::parallel_for(
      0, rows.size(0), grain_rows(num_experts), [&](int64_t begin, int64_t end) { spread_rows(gradient, begin, end); });
  return grad_logits;
}

} // namespace
} // namespace edl::cpu

TORCH_LIBRARY_IMPL(edl, CPU, m) {
  m.impl("route_tokens", edl::cpu::route_tokens_cpu);
  m.impl("_route_tokens_backward", edl::cpu::route_tokens_backward_cpu);
}
