#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "common/errors.h"

namespace edl::cpu {

// A reader of int32 or int64 ids that hides which of the two they are.
class Indices {
 public:
  explicit Indices(const at::Tensor& contiguous)
      : data_(contiguous.const_data_ptr()), are_64_bit_(contiguous.scalar_type() == at::kLong) {}

  int64_t operator[](int64_t i) const {
    return are_64_bit_ ? static_cast<const int64_t*>(data_)[i] : static_cast<const int32_t*>(data_)[i];
  }
  bool are_64_bit() const {
    return are_64_bit_;
  }
  const void* data() const {
    return data_;
  }

 private:
  const void* data_; // null where there are no ids
  bool are_64_bit_;
};

} // namespace edl::cpu
