#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "common/scores.h"

namespace edl {

// What a layer's routing adds up to in each segment, for statistics: choices [S, E] and tokens [S], how many tokens chose
// two experts [E, E], all int64; and in float64 the mass of scores [S, E], and of tokens their entropy [S], and the
// margin of the K-th highest to the next [S], NaN where K = E. Without routing these three are NaN; without experts the
// K highest are chosen. On the CPU alone. `op`: in whose name it refuses.
Scores check_routing_sums(
    std::string_view op,
    const std::optional<at::Tensor>& routing, // [T, E]
    const std::optional<at::Tensor>& experts, // [T, K], in [0, E], E for none
    const at::Tensor& segment_ids, //            [T]
    const c10::SymInt& num_segments, //          S
    const c10::SymInt& num_experts, //           E
    int64_t top_k, //                            K
    std::string_view scores);

} // namespace edl
