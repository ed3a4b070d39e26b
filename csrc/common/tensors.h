#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <optional>
#include <string_view>

#include "common/errors.h"
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

// Memory can be taken from a tensor that keeps its shape, as FSDP does with parameters that are not in use.
inline void check_memory(std::string_view op, const at::Tensor& tensor) {
  if (!tensor.defined() || tensor.numel() == 0) {
    return;
  }
  const size_t needed = at::detail::computeStorageNbytes(
      tensor.sizes(), tensor.strides(), tensor.element_size(), tensor.storage_offset());
  const size_t held = tensor.storage().nbytes();
  EDL_ENSURE(
      needed <= held, op, ": a tensor must have the memory of its shape, which FSDP frees outside its module's passes ",
      "(got ", held, " of ", needed, " bytes for ", tensor.sizes(), ")");
}

inline void check_memory(std::string_view op, const std::optional<at::Tensor>& tensor) {
  if (tensor.has_value()) {
    check_memory(op, *tensor);
  }
}

// Of every tensor whose data pointer an operator takes, before it does.
template <typename First, typename Second, typename... Others>
void check_memory(std::string_view op, const First& first, const Second& second, const Others&... others) {
  check_memory(op, first);
  check_memory(op, second);
  (check_memory(op, others), ...);
}

// A result of the form of another where it is asked for, else without elements.
inline at::Tensor empty_if(bool is_asked, const at::Tensor& like) {
  const c10::SymInt nothing = 0;
  return at::empty_symint(is_asked ? like.sym_sizes() : c10::SymIntArrayRef(nothing), like.options());
}

// Dense in a type; undefined, and null, where there is none.
inline at::Tensor dense_if(const std::optional<at::Tensor>& tensor, at::ScalarType type) {
  return tensor.has_value() ? tensor->to(type).contiguous() : at::Tensor();
}
inline const void* data_if(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}

// Rows may have any stride, entries of a row stand side by side.
inline at::Tensor with_dense_rows(const at::Tensor& matrix) {
  return matrix.stride(1) == 1 || matrix.size(1) == 1 ? matrix : matrix.contiguous();
}

} // namespace edl
