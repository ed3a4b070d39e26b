// _routing_sums on the CPU: routing [T, E], experts [T, K], segment_ids [T] → choices, mass [S, E], tokens [S],
// coactivation [E, E], entropy, margin [S].
//
// The pieces of the segments (segment_plan.h) are summed each for itself, and added in order; choices are counted in
// integers. So the result does not depend on the number of threads. Scratch O(T + S·E), and at most T·K² counts.
#include "ops/routing_sums.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <mutex>
#include <vector>

#include "common/errors.h"
#include "common/tensors.h"
#include "cpu/indices.h"
#include "cpu/isa/routing_sums.h"
#include "cpu/row_censuses.h"
#include "cpu/segment_plan.h"
#include "edl/route_tokens.h"

namespace edl::cpu {
namespace {

constexpr int64_t kGrainElements = 1 << 14; // work below this is not worth waking a thread

int64_t divide_up(int64_t amount, int64_t size) {
  return (amount + size - 1) / size;
}

// ---- scores ----

void sum_scores(
    std::string_view op,
    const SegmentPlan& plan,
    const at::Tensor& routing,
    int64_t top_k,
    Scores scores,
    double* mass, //      [S, E], zero before, as the others
    double* entropy, //   [S]
    double* margin) { //  [S]
  const at::Tensor dense = with_dense_rows(routing);
  const int64_t num_experts = dense.size(1), num_pieces = static_cast<int64_t>(plan.pieces.size());
  const RoutingRows rows{
      dense.const_data_ptr(), dense.stride(0), num_experts, plan.order.empty() ? nullptr : plan.order.data()};
  const StorageType storage = storage_of(dense);
  const auto sum_piece = routing_sums_loops().sum_piece[static_cast<int>(storage)][static_cast<int>(scores)];
  const double tolerance = distribution_tolerance(storage);
  std::vector<double> piece_mass(num_pieces * num_experts);
  std::vector<RowCensus> censuses(num_pieces);
  std::vector<ScoredPiece> pieces(num_pieces);
  at::parallel_for(0, num_pieces, divide_up(kGrainElements, num_experts * kPieceRows), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const SegmentPiece& piece = plan.pieces[i];
      pieces[i] = {piece.begin, piece.end, piece_mass.data() + i * num_experts, 0, 0, &censuses[i]};
      sum_piece(rows, top_k, tolerance, &pieces[i]);
    }
  });
  check_censuses(op, censuses, scores, num_experts);
  for (int64_t i = 0; i < num_pieces; ++i) {
    const int64_t segment = plan.pieces[i].segment;
    for (int64_t e = 0; e < num_experts; ++e) {
      mass[segment * num_experts + e] += pieces[i].mass[e];
    }
    entropy[segment] += pieces[i].entropy;
    margin[segment] += pieces[i].margin;
  }
}

// ---- choices ----

// What some tokens chose; counts, so the order in which they are added does not show.
struct Chosen {
  Chosen(int64_t num_segments, int64_t num_experts)
      : by_segment(num_segments * num_experts), pairs(num_experts * num_experts), last_token(num_experts, -1) {}
  std::vector<int64_t> by_segment; //  [S, E]
  std::vector<int64_t> pairs; //       [E, E], each in the order in which a token names them
  std::vector<int64_t> last_token; //  [E], that chose it
  std::vector<int64_t> of_token; //    different experts of one
};

void count_token(
    std::string_view op,
    const Indices& experts,
    int64_t token,
    int64_t top_k,
    int64_t num_experts,
    int64_t segment,
    Chosen* chosen) {
  chosen->of_token.clear();
  for (int64_t slot = token * top_k; slot < (token + 1) * top_k; ++slot) {
    const int64_t id = experts[slot];
    EDL_ENSURE_INDEX(
        id >= 0 && id <= num_experts, op, ": experts must be in [0, ", num_experts, "], ", num_experts,
        " for none (got ", id, ")");
    if (id == num_experts) {
      continue;
    }
    ++chosen->by_segment[segment * num_experts + id];
    if (chosen->last_token[id] != token) { // one that is named twice is one partner
      chosen->last_token[id] = token;
      chosen->of_token.push_back(id);
    }
  }
  const auto& ids = chosen->of_token;
  for (size_t i = 0; i < ids.size(); ++i) {
    for (size_t j = i; j < ids.size(); ++j) {
      ++chosen->pairs[ids[i] * num_experts + ids[j]];
    }
  }
}

void add_chosen(
    const Chosen& chosen, int64_t num_segments, int64_t num_experts, int64_t* choices, int64_t* coactivation) {
  for (int64_t i = 0; i < num_segments * num_experts; ++i) {
    choices[i] += chosen.by_segment[i];
  }
  for (int64_t a = 0; a < num_experts; ++a) {
    for (int64_t b = 0; b < num_experts; ++b) {
      const int64_t turned = a == b ? 0 : chosen.pairs[b * num_experts + a];
      coactivation[a * num_experts + b] += chosen.pairs[a * num_experts + b] + turned;
    }
  }
}

void count_choices(
    std::string_view op,
    const SegmentPlan& plan,
    const at::Tensor& experts,
    int64_t num_segments,
    int64_t num_experts,
    int64_t* choices, //         [S, E], zero before
    int64_t* coactivation) { //  [E, E], zero before
  const at::Tensor dense = experts.contiguous();
  const Indices ids(dense);
  const int64_t top_k = dense.size(1), num_pieces = static_cast<int64_t>(plan.pieces.size());
  // Counts of its own cost a thread as much as so many tokens do.
  const int64_t tokens = std::max(kGrainElements, num_experts * (num_segments + num_experts)) / (top_k * top_k);
  std::mutex adding;
  at::parallel_for(0, num_pieces, divide_up(tokens + 1, kPieceRows), [&](int64_t begin, int64_t end) {
    Chosen chosen(num_segments, num_experts);
    for (int64_t i = begin; i < end; ++i) {
      const SegmentPiece& piece = plan.pieces[i];
      for (int64_t row = piece.begin; row < piece.end; ++row) {
        const int64_t token = plan.order.empty() ? row : plan.order[row];
        count_token(op, ids, token, top_k, num_experts, piece.segment, &chosen);
      }
    }
    const std::lock_guard<std::mutex> lock(adding);
    add_chosen(chosen, num_segments, num_experts, choices, coactivation);
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> routing_sums_cpu(
    const std::optional<at::Tensor>& routing,
    const std::optional<at::Tensor>& given,
    const at::Tensor& segment_ids,
    int64_t num_segments,
    int64_t num_experts,
    int64_t top_k,
    std::string_view scores_name,
    std::string_view op) {
  const Scores scores =
      check_routing_sums(op, routing, given, segment_ids, num_segments, num_experts, top_k, scores_name);
  check_memory(op, routing, given, segment_ids);
  const at::Tensor dense_ids = segment_ids.contiguous();
  const Indices ids(dense_ids);
  const int64_t num_tokens = dense_ids.size(0);
  std::vector<int64_t> tokens_of(num_segments, 0);
  const int64_t runs = count_segments(op, ids, num_tokens, num_segments, &tokens_of);
  const SegmentPlan plan = make_plan(ids, num_tokens, tokens_of, runs);

  const auto counts = segment_ids.options().dtype(at::kLong), sums = segment_ids.options().dtype(at::kDouble);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  at::Tensor tokens = at::empty({num_segments}, counts);
  std::copy(tokens_of.begin(), tokens_of.end(), tokens.mutable_data_ptr<int64_t>());
  at::Tensor mass = at::full({num_segments, num_experts}, routing.has_value() ? 0.0 : nan, sums);
  at::Tensor entropy = at::full({num_segments}, routing.has_value() ? 0.0 : nan, sums);
  at::Tensor margin = at::full({num_segments}, routing.has_value() ? 0.0 : nan, sums);
  if (routing.has_value()) {
    sum_scores(
        op, plan, *routing, top_k, scores, mass.mutable_data_ptr<double>(), entropy.mutable_data_ptr<double>(),
        margin.mutable_data_ptr<double>());
    if (top_k == num_experts) {
      margin.fill_(nan); // there is no next
    }
  }
  const at::Tensor experts = given.has_value() ? *given : std::get<1>(route_tokens(*routing, top_k, "softmax"));
  at::Tensor choices = at::zeros({num_segments, num_experts}, counts);
  at::Tensor coactivation = at::zeros({num_experts, num_experts}, counts);
  count_choices(
      op, plan, experts, num_segments, num_experts, choices.mutable_data_ptr<int64_t>(),
      coactivation.mutable_data_ptr<int64_t>());
  return {choices, mass, tokens, coactivation, entropy, margin};
}

} // namespace
} // namespace edl::cpu

TORCH_LIBRARY_IMPL(edl, CPU, m) {
  m.impl("_routing_sums", edl::cpu::routing_sums_cpu);
}
