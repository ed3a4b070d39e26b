#pragma once

#include <cstdint>

#include "common/storage_type.h"

namespace edl::cuda {

// 16-bit types are for storage: everything is computed in float32, float64 input in float64.
inline constexpr int64_t size_of(StorageType type) {
  return type == StorageType::float64 ? 8 : type == StorageType::float32 ? 4 : 2;
}

inline constexpr int64_t accumulation_size_of(StorageType type) {
  return type == StorageType::float64 ? 8 : 4;
}

// Packs of 16 bytes start where this holds.
inline bool is_aligned_to_16(const void* data) {
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0;
}

} // namespace edl::cuda
