#pragma once

// The C++ surface of edl. Including this header also keeps libedl linked, and with it the registered operators.

#include "edl/aggregate_routing.h"
#include "edl/combine_tokens.h"
#include "edl/dispatch_tokens.h"
#include "edl/domain_moments.h"
#include "edl/expert_divergence.h"
#include "edl/expert_divergence_loss.h"
#include "edl/expert_mlp.h"
#include "edl/export.h"
#include "edl/inject.h"
#include "edl/pairwise_divergence.h"
#include "edl/route_tokens.h"
#include "edl/sequence_segment_ids.h"
#include "edl/sort_by_expert.h"
#include "edl/token_gram.h"

namespace edl {

EDL_API const char* version();
EDL_API const char* cpu_instruction_set(); // "baseline", "avx2", "avx512" or "avx512_amx"

namespace detail {
// A linker drops a library that no symbol is taken from; this takes one.
[[gnu::used]] inline const auto keep_library_linked = &version;
} // namespace detail

} // namespace edl
