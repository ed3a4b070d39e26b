#pragma once

#include <ATen/core/Tensor.h>

#include "edl/export.h"

namespace edl {

// The segment of every token of a batch of sequences of one length, each a segment: token t belongs to sequence
// t / (T / B), and to none (-1) where that has the label -1. No gradient. Returns ids [T] int32.
EDL_API at::Tensor sequence_segment_ids(
    const at::Tensor& labels, // [B] int32 or int64; -1 = not counted
    c10::SymInt num_tokens); //  T, a multiple of B

} // namespace edl
