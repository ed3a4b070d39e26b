#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>
#include <tuple>

#include "edl/sort_by_expert.h"

namespace edl {

// sort_by_expert in the name of the function that was called.
std::tuple<at::Tensor, at::Tensor> sort_by_expert_for(
    const at::Tensor& experts, c10::SymInt num_experts, std::string_view op);

void check_sort_by_expert(std::string_view op, const at::Tensor& experts, const c10::SymInt& num_experts);

} // namespace edl
