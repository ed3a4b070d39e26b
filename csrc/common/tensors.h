#pragma once

#include <ATen/core/Tensor.h>

#include "common/storage_type.h"

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

// Rows may have any stride, entries of a row stand side by side.
inline at::Tensor with_dense_rows(const at::Tensor& matrix) {
  return matrix.stride(1) == 1 || matrix.size(1) == 1 ? matrix : matrix.contiguous();
}

} // namespace edl
