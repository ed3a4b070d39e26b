// aggregate_routing on the CPU: routing [T, E], segment_ids [T] → sums [S, E], counts [S].
//
// The tokens of a segment are cut into pieces of at most kPieceRows rows; a piece is summed in float32 (float64 for
// float64), the pieces of a segment in float64, in order. Where ids come in runs (sequences), the pieces are the runs
// and rows are read where they lie; else a stable counting sort brings the rows of a segment together. Pieces depend on
// the ids alone, so the result does not depend on the number of threads. Scratch O(T + S·E). Cost: one read of routing.
#include "ops/aggregate_routing.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "common/dtypes.h"
#include "common/errors.h"
#include "common/tensors.h"
#include "cpu/indices.h"
#include "cpu/isa/aggregate_routing.h"
#include "cpu/pages.h"
#include "cpu/row_censuses.h"
#include "cpu/segment_plan.h"

namespace edl::cpu {
namespace {

constexpr int64_t kGrainElements = 1 << 16; // work below this is not worth waking a thread
// Gradients above this size are streamed past the caches, unless they lie on fresh pages: the system's clearing has just
// brought those into the caches, and streaming halved the speed.
constexpr int64_t kStreamFromBytes = 4 << 20;

// sums[s] = the pieces of s, added in order.
template <typename Acc>
void add_up_pieces(const SegmentPlan& plan, const Acc* partial, int64_t num_experts, int64_t num_segments, Acc* sums) {
  at::parallel_for(
      0, num_segments, std::max<int64_t>(1, kGrainElements / num_experts), [&](int64_t begin, int64_t end) {
        std::vector<double> total(num_experts);
        for (int64_t s = begin; s < end; ++s) {
          const int64_t first = plan.first_piece[s];
          const int64_t last = plan.first_piece[s + 1];
          Acc* out = sums + s * num_experts;
          if (last - first == 1) {
            std::copy_n(partial + first * num_experts, num_experts, out);
            continue;
          }
          std::fill(total.begin(), total.end(), 0.0);
          for (int64_t piece = first; piece < last; ++piece) {
            for (int64_t e = 0; e < num_experts; ++e) {
              total[e] += static_cast<double>(partial[piece * num_experts + e]);
            }
          }
          for (int64_t e = 0; e < num_experts; ++e) {
            out[e] = static_cast<Acc>(total[e]);
          }
        }
      });
}

template <typename Acc>
void sum_pieces(
    std::string_view op,
    const SegmentPlan& plan,
    RoutingRows rows,
    Scores scores,
    StorageType storage,
    int64_t num_segments,
    Acc* sums) {
  const auto sum_at_once = aggregate_routing_loops().sum_pieces[static_cast<int>(storage)][static_cast<int>(scores)];
  const double tolerance = distribution_tolerance(storage);
  const int64_t num_experts = rows.num_experts;
  const int64_t num_pieces = static_cast<int64_t>(plan.pieces.size());
  std::vector<Acc> partial(num_pieces * num_experts, Acc(0));
  std::vector<RowCensus> censuses(num_pieces);
  rows.order = plan.order.empty() ? nullptr : plan.order.data();
  const int64_t grain = std::max<int64_t>(1, kGrainElements / (num_experts * kPieceRows));
  at::parallel_for(0, num_pieces, grain, [&](int64_t begin, int64_t end) {
    // Pieces far from each other go together, and each is followed by its neighbour: so many streams of reads.
    const int64_t apart = (end - begin + kPiecesAtOnce - 1) / kPiecesAtOnce;
    for (int64_t first = begin; first < begin + apart; ++first) {
      RowPiece together[kPiecesAtOnce];
      int64_t count = 0;
      for (int64_t i = first; i < end; i += apart) {
        const SegmentPiece& piece = plan.pieces[i];
        together[count++] = {piece.begin, piece.end, partial.data() + i * num_experts, &censuses[i]};
      }
      sum_at_once(rows, together, count, tolerance);
    }
  });
  check_censuses(op, censuses, scores, num_experts);
  add_up_pieces(plan, partial.data(), num_experts, num_segments, sums);
}

std::tuple<at::Tensor, at::Tensor> aggregate_routing_cpu(
    const at::Tensor& routing,
    const at::Tensor& segment_ids,
    int64_t num_segments,
    std::string_view scores_name,
    std::string_view op) {
  const Scores scores = check_aggregate_routing(op, routing, segment_ids, num_segments, scores_name);
  check_memory(op, routing, segment_ids);
  const at::Tensor rows = with_dense_rows(routing);
  const at::Tensor dense_ids = segment_ids.contiguous();
  const Indices ids(dense_ids);
  const int64_t num_tokens = rows.size(0);
  const auto options = routing.options().dtype(accumulation_type(routing.scalar_type()));
  at::Tensor sums = at::empty({num_segments, rows.size(1)}, options);
  at::Tensor counts = at::empty({num_segments}, options);

  std::vector<int64_t> tokens_of(num_segments, 0);
  const int64_t runs = count_segments(op, ids, num_tokens, num_segments, &tokens_of);
  const SegmentPlan plan = make_plan(ids, num_tokens, tokens_of, runs);
  const RoutingRows view{rows.const_data_ptr(), rows.stride(0), rows.size(1), nullptr};
  const auto run = [&](auto* out_sums, auto* out_counts) {
    std::copy(tokens_of.begin(), tokens_of.end(), out_counts);
    sum_pieces(op, plan, view, scores, storage_of(rows), num_segments, out_sums);
  };
  if (sums.scalar_type() == at::kDouble) {
    run(sums.mutable_data_ptr<double>(), counts.mutable_data_ptr<double>());
  } else {
    run(sums.mutable_data_ptr<float>(), counts.mutable_data_ptr<float>());
  }
  return {sums, counts};
}

// Ids may have changed since they were checked: where NumPy shares their memory, autograd does not notice.
template <typename Id>
void check_unchanged_ids(std::string_view op, const Id* ids, int64_t begin, int64_t end, int64_t num_segments) {
  bool all_valid = true;
  for (int64_t t = begin; t < end; ++t) {
    all_valid &= ids[t] >= -1 && ids[t] < num_segments;
  }
  EDL_ENSURE_INDEX(
      all_valid, op,
      ": segment_ids must stay as they are until the backward pass (got one that is now below -1 or not "
      "below ",
      num_segments, ", the number of segments)");
}

at::Tensor aggregate_routing_backward_cpu(
    const at::Tensor& grad_sums,
    const at::Tensor& routing,
    const at::Tensor& segment_ids,
    std::string_view scores_name,
    std::string_view op) {
  const Scores scores = check_aggregate_routing_backward(op, grad_sums, routing, segment_ids, scores_name);
  check_memory(op, grad_sums, routing, segment_ids);
  const at::Tensor rows = with_dense_rows(routing);
  const at::Tensor dense_grad = grad_sums.contiguous();
  const at::Tensor dense_ids = segment_ids.contiguous();
  const Indices ids(dense_ids);
  at::Tensor grad_routing = at::empty(routing.sizes(), routing.options().memory_format(at::MemoryFormat::Contiguous));
  const int64_t num_experts = rows.size(1);
  const int64_t num_segments = dense_grad.size(0);
  const auto bytes = static_cast<int64_t>(grad_routing.nbytes());
  const RoutingGradient gradient{
      dense_grad.const_data_ptr(),
      ids.data(),
      ids.are_64_bit(),
      rows.const_data_ptr(),
      rows.stride(0),
      num_experts,
      grad_routing.mutable_data_ptr(),
      bytes > kStreamFromBytes && !is_on_fresh_pages(grad_routing)};
  const auto spread_rows =
      aggregate_routing_loops().spread_rows[static_cast<int>(storage_of(rows))][static_cast<int>(scores)];
  at::parallel_for(
      0, rows.size(0), std::max<int64_t>(1, kGrainElements / num_experts), [&](int64_t begin, int64_t end) {
        if (ids.are_64_bit()) {
          check_unchanged_ids(op, static_cast<const int64_t*>(ids.data()), begin, end, num_segments);
        } else {
          check_unchanged_ids(op, static_cast<const int32_t*>(ids.data()), begin, end, num_segments);
        }
        spread_rows(gradient, begin, end);
      });
  return grad_routing;
}

} // namespace
} // namespace edl::cpu

TORCH_LIBRARY_IMPL(edl, CPU, m) {
  m.impl("aggregate_routing", edl::cpu::aggregate_routing_cpu);
  m.impl("_aggregate_routing_backward", edl::cpu::aggregate_routing_backward_cpu);
}
