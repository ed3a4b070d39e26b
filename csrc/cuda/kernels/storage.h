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

// Every row starts with one, and consists of them where its width is named too.
inline bool rows_are_aligned(const void* data, int64_t stride, StorageType storage) {
  return is_aligned_to_16(data) && stride * size_of(storage) % 16 == 0;
}
inline bool rows_are_aligned(const void* data, int64_t stride, int64_t width, StorageType storage) {
  return rows_are_aligned(data, stride, storage) && width * size_of(storage) % 16 == 0;
}

} // namespace edl::cuda
