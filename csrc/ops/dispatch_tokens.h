#pragma once

#include <ATen/core/Tensor.h>

#include "edl/dispatch_tokens.h"

namespace edl {

void check_dispatch_tokens(const at::Tensor& tokens, const at::Tensor& row_order, int64_t top_k);

} // namespace edl
