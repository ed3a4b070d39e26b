#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/isa/storage.h"

namespace edl {

inline StorageType storage_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return StorageType::float64;
    case at::kBFloat16:
      return StorageType::bfloat16;
    case at::kHalf:
      return StorageType::float16;
    default:
      return StorageType::float32;
  }
}

} // namespace edl
