#pragma once

#include <ATen/core/Tensor.h>

#include "edl/sort_by_expert.h"

namespace edl {

void check_sort_by_expert(const at::Tensor& experts, const c10::SymInt& num_experts);

} // namespace edl
