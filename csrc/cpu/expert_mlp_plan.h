#pragma once

// How expert_mlp cuts its rows, without a torch header.
//
//   rows in sorted order   |  e0  |   e1   | e2 |        e3 ...        |   e4   |
//   windows                |<----------------->|<----------->|<----------------->|   scratch holds the rows of one window
//   blocks                 |<---->|<->|<-->|...                                      tasks of the stages that own rows
//
// An expert is shared by two windows only where it has more rows than fit one, and cut at a multiple of the row unit
// counted from its first row: tiles add up that many rows at once, so that cuts elsewhere would change bits.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/isa/expert_mlp.h"

namespace edl::cpu {

struct Window {
  std::vector<ExpertRows> experts; // experts without rows too: their gradients are zeros
  std::vector<ExpertRows> blocks;
  int64_t rows = 0; // in scratch, where each expert's are rounded up

  int64_t begin() const {
    return experts.front().begin;
  }
  int64_t end() const {
    return experts.back().end;
  }
};

// Windows take at most `window_rows` rows, blocks `block_rows`; both are multiples of `row_unit`, at which scratch rounds
// up the rows of an expert.
inline std::vector<Window> cut_windows(
    const int32_t* offsets, int64_t num_experts, int64_t window_rows, int64_t block_rows, int64_t row_unit) {
  const auto rounded = [row_unit](int64_t rows) { return (rows + row_unit - 1) / row_unit * row_unit; };
  std::vector<Window> windows(1);
  for (int64_t e = 0; e < num_experts; ++e) {
    const int64_t end = offsets[e + 1];
    int64_t begin = offsets[e];
    do { // once for an expert without rows
      if (!windows.back().experts.empty() && windows.back().rows + rounded(end - begin) > window_rows) {
        windows.emplace_back();
      }
      Window& window = windows.back();
      const int64_t stop = std::min(end, begin + window_rows);
      window.experts.push_back({e, begin, stop, window.rows});
      for (int64_t row = begin; row < stop; row += block_rows) {
        window.blocks.push_back({e, row, std::min(stop, row + block_rows), window.rows + row - begin});
      }
      window.rows += rounded(stop - begin);
      begin = stop;
    } while (begin < end);
  }
  return windows;
}

// Columns in pieces of at most kTokenColumns, of which every number of threads up to `num_threads` gets its share.
inline std::vector<Columns> cut_columns(int64_t columns, int64_t num_threads) {
  constexpr int64_t unit = 16;
  const int64_t fewest = (columns + kTokenColumns - 1) / kTokenColumns;
  const int64_t pieces = (fewest + num_threads - 1) / num_threads * num_threads;
  const int64_t width =
      std::max<int64_t>(unit, ((columns + pieces - 1) / std::max<int64_t>(1, pieces) + unit - 1) / unit * unit);
  std::vector<Columns> cut;
  for (int64_t begin = 0; begin < columns; begin += width) {
    cut.push_back({begin, std::min(columns, begin + width)});
  }
  return cut;
}

} // namespace edl::cpu
