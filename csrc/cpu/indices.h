#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "common/errors.h"

namespace edl {

// A reader of int32 or int64 ids that hides which of the two they are.
class Indices {
 public:
  explicit Indices(const at::Tensor& contiguous)
      : narrow_(contiguous.scalar_type() == at::kInt ? contiguous.const_data_ptr<int32_t>() : nullptr),
        wide_(narrow_ == nullptr ? contiguous.const_data_ptr<int64_t>() : nullptr) {}

  int64_t operator[](int64_t i) const {
    return narrow_ != nullptr ? narrow_[i] : wide_[i];
  }
  bool are_64_bit() const {
    return narrow_ == nullptr;
  }
  const void* data() const {
    return narrow_ != nullptr ? static_cast<const void*>(narrow_) : wide_;
  }

 private:
  const int32_t* narrow_;
  const int64_t* wide_;
};

} // namespace edl
