#include "cpu/segment_plan.h"

#include <algorithm>
#include <limits>

#include "common/errors.h"

namespace edl::cpu {
namespace {

void add_pieces(int64_t segment, int64_t begin, int64_t end, std::vector<SegmentPiece>* pieces) {
  for (; begin < end; begin += kPieceRows) {
    pieces->push_back({segment, begin, std::min(begin + kPieceRows, end)});
  }
}

// Tokens [begin, end) with one id.
struct IdRun {
  int64_t id;
  int64_t begin;
  int64_t end;
};

// Calls take(run) for the runs of equal ids, in order.
template <typename Id, typename Take>
void for_runs_of(const Id* ids, int64_t num_tokens, Take take) {
  for (int64_t begin = 0; begin < num_tokens;) {
    const Id id = ids[begin];
    int64_t end = begin + 1;
    while (end < num_tokens && ids[end] == id) {
      ++end;
    }
    take(IdRun{id, begin, end});
    begin = end;
  }
}

template <typename Take>
void for_runs(const Indices& ids, int64_t num_tokens, Take take) {
  if (ids.are_64_bit()) {
    for_runs_of(static_cast<const int64_t*>(ids.data()), num_tokens, take);
  } else {
    for_runs_of(static_cast<const int32_t*>(ids.data()), num_tokens, take);
  }
}

SegmentPlan plan_runs(const Indices& ids, int64_t num_tokens) {
  SegmentPlan plan;
  for_runs(ids, num_tokens, [&](IdRun run) {
    if (run.id >= 0) {
      add_pieces(run.id, run.begin, run.end, &plan.pieces);
    }
  });
  std::stable_sort(plan.pieces.begin(), plan.pieces.end(), [](const SegmentPiece& a, const SegmentPiece& b) {
    return a.segment < b.segment;
  });
  return plan;
}

SegmentPlan plan_sorted(const Indices& ids, int64_t num_tokens, const std::vector<int64_t>& counts) {
  SegmentPlan plan;
  std::vector<int64_t> next(counts.size());
  int64_t total = 0;
  for (size_t s = 0; s < counts.size(); ++s) {
    next[s] = total;
    add_pieces(static_cast<int64_t>(s), total, total + counts[s], &plan.pieces);
    total += counts[s];
  }
  plan.order.resize(total);
  for (int64_t t = 0; t < num_tokens; ++t) {
    if (ids[t] >= 0) {
      plan.order[next[ids[t]]++] = static_cast<int32_t>(t);
    }
  }
  return plan;
}

} // namespace

int64_t count_segments(
    std::string_view op, const Indices& ids, int64_t num_tokens, int64_t num_segments, std::vector<int64_t>* counts) {
  int64_t runs = 0;
  for_runs(ids, num_tokens, [&](IdRun run) {
    EDL_ENSURE_INDEX(
        run.id >= -1 && run.id < num_segments, op, ": segment_ids must be at least -1 and below ", num_segments,
        ", the number of segments (got ", run.id, " at row ", run.begin,
        "; edl.segments gives this id to a token whose label or mask value is not allowed, and to all where cu_seqlens "
        "does not rise from 0)");
    ++runs;
    if (run.id >= 0) {
      (*counts)[run.id] += run.end - run.begin;
    }
  });
  return runs;
}

SegmentPlan make_plan(const Indices& ids, int64_t num_tokens, const std::vector<int64_t>& counts, int64_t runs) {
  // A run costs a piece, so short runs would cost more than the sort, which holds rows as int32.
  const bool sortable = num_tokens <= std::numeric_limits<int32_t>::max();
  SegmentPlan plan = runs <= num_tokens / 16 + static_cast<int64_t>(counts.size()) || !sortable
      ? plan_runs(ids, num_tokens)
      : plan_sorted(ids, num_tokens, counts);
  plan.first_piece.assign(counts.size() + 1, 0);
  for (const SegmentPiece& piece : plan.pieces) {
    ++plan.first_piece[piece.segment + 1];
  }
  for (size_t s = 0; s < counts.size(); ++s) {
    plan.first_piece[s + 1] += plan.first_piece[s];
  }
  return plan;
}

} // namespace edl::cpu
