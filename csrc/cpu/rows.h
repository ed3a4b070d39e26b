#pragma once

#include <ATen/core/Tensor.h>

namespace edl {

// Rows may have any stride, entries of a row stand side by side.
inline at::Tensor with_dense_rows(const at::Tensor& matrix) {
  return matrix.stride(1) == 1 || matrix.size(1) == 1 ? matrix : matrix.contiguous();
}

} // namespace edl
