#pragma once

namespace edl {

// The element types of a tensor that a loop or a kernel reads or writes. Without torch headers.
enum class StorageType { float32, float64, bfloat16, float16 };
inline constexpr int kStorageTypes = 4;

} // namespace edl
