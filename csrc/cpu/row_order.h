#pragma once

#include <cstdint>
#include <vector>

#include "common/errors.h"

namespace edl::cpu {

// The row at which each slot stands. Refuses a row_order that does not name each slot exactly once.
inline std::vector<int32_t> rows_of_slots(const char* op, const int32_t* row_order, int64_t num_rows) {
  std::vector<int32_t> rows(num_rows, -1);
  for (int64_t i = 0; i < num_rows; ++i) {
    const int64_t slot = row_order[i];
    EDL_ENSURE_INDEX(
        slot >= 0 && slot < num_rows && rows[slot] < 0, op, ": row_order must name each of the ", num_rows,
        " slots once (got ", slot, " at row ", i, ")");
    rows[slot] = static_cast<int32_t>(i);
  }
  return rows;
}

} // namespace edl::cpu
