#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "edl/export.h"

namespace edl {

// Groups the T·K slots (token t's k-th choice is slot t·K + k) by expert, stably. An id equal to E is a sentinel, "no
// expert here": it sorts last, behind offsets[E]. No gradient.
// Returns row_order [T·K] int32, the slot that stands at each row, and offsets [E + 1] int32: expert e owns the rows
// offsets[e] .. offsets[e + 1], and offsets[E] is the number of rows that have an expert.
EDL_API std::tuple<at::Tensor, at::Tensor> sort_by_expert(
    const at::Tensor& experts, // [T, K] int32 or int64, in [0, E]
    c10::SymInt num_experts); //  E

} // namespace edl
