#pragma once

#include <c10/core/ScalarType.h>

namespace edl {

// bfloat16 and float16 are storage types: everything is computed and summed in float32, float64 input in float64.
inline c10::ScalarType accumulation_type(c10::ScalarType storage) {
  return storage == c10::kDouble ? c10::kDouble : c10::kFloat;
}

inline bool is_storage_type(c10::ScalarType type) {
  return type == c10::kFloat || type == c10::kDouble || type == c10::kBFloat16 || type == c10::kHalf;
}

inline bool is_index_type(c10::ScalarType type) {
  return type == c10::kInt || type == c10::kLong;
}

} // namespace edl
