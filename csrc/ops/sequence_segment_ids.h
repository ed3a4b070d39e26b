#pragma once

#include <ATen/core/Tensor.h>

#include "edl/sequence_segment_ids.h"

namespace edl {

void check_sequence_segment_ids(const at::Tensor& labels, const c10::SymInt& num_tokens);

} // namespace edl
