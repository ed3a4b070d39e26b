#pragma once

#include <ATen/core/Tensor.h>

#include "common/storage_type.h"
#include "cpu/isa/token_gram.h"

namespace edl::cpu {

// Gram matrices [T, K, K] in the accumulation type; `options` are those of the rows.
at::Tensor grams_of(const TokenRows& tokens, StorageType storage, int64_t num_tokens, const at::TensorOptions& options);

// grad_rows, and grad_weights where asked for.
void spread_grams(const TokenGramGradient& gradient, StorageType storage, int64_t num_tokens);

} // namespace edl::cpu
