#pragma once

// The C++ surface of edl. Including this header also keeps libedl linked, and with it the registered operators.

#include "common/export.h"
#include "ops/aggregate_routing.h"
#include "ops/combine_tokens.h"
#include "ops/dispatch_tokens.h"
#include "ops/domain_moments.h"
#include "ops/expert_divergence.h"
#include "ops/expert_mlp.h"
#include "ops/inject.h"
#include "ops/pairwise_divergence.h"
#include "ops/route_tokens.h"
#include "ops/sequence_segment_ids.h"
#include "ops/sort_by_expert.h"

namespace edl {

EDL_API const char* version();
EDL_API const char* cpu_instruction_set(); // "baseline", "avx2" or "avx512"

namespace detail {
// A linker drops a library that no symbol is taken from; this takes one.
[[gnu::used]] inline const auto keep_library_linked = &version;
} // namespace detail

} // namespace edl
