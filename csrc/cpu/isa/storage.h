#pragma once

namespace edl {

// The element types of a tensor that a loop reads or writes; loops are tables indexed by it.
enum class StorageType { float32, float64, bfloat16, float16 };
inline constexpr int kStorageTypes = 4;

} // namespace edl
