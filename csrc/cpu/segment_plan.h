#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "cpu/indices.h"

// The tokens of each segment in pieces, which threads share among them. Pieces depend on the ids alone.
namespace edl::cpu {

inline constexpr int64_t kPieceRows = 256;

struct SegmentPiece {
  int64_t segment;
  int64_t begin;
  int64_t end;
};

struct SegmentPlan {
  std::vector<SegmentPiece> pieces; // by segment, then by row
  std::vector<int32_t> order; // [T'] rows by segment; empty where pieces are ranges of rows
  std::vector<int64_t> first_piece; // [S + 1]
};

// Counts the tokens of each segment and refuses ids that name none. Returns the number of runs of equal ids.
int64_t count_segments(
    std::string_view op, const Indices& ids, int64_t num_tokens, int64_t num_segments, std::vector<int64_t>* counts);

// Of what `count_segments` counted.
SegmentPlan make_plan(const Indices& ids, int64_t num_tokens, const std::vector<int64_t>& counts, int64_t runs);

} // namespace edl::cpu
