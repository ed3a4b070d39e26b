#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "common/score_function.h"
#include "common/storage_type.h"
#include "cpu/isa/routing_rows.h"

namespace edl::cpu {

// How far from 1 the sum of a distribution may be.
double distribution_tolerance(StorageType storage);

// Logits taken for probabilities, and the reverse, train quietly on a wrong loss: refuses both.
void check_censuses(std::string_view op, const std::vector<RowCensus>& censuses, Scores scores, int64_t num_experts);

} // namespace edl::cpu
