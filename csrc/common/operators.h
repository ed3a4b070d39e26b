#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <string_view>

#include "common/errors.h"

namespace edl {

// The registered operator of a function's signature: find_operator<decltype(f)>("edl::f").
template <typename Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name, const char* overload = "") {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Signature>();
}

// Whether autograd must know of this call; a tangent of forward-mode differentiation too goes to the autograd function,
// which refuses it.
inline bool needs_gradient(const at::Tensor& tensor) {
  return tensor.defined() &&
      ((c10::GradMode::is_enabled() && tensor.requires_grad()) || tensor._fw_grad(/*level=*/0).defined());
}

inline bool needs_gradient(at::TensorList tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const at::Tensor& tensor) { return needs_gradient(tensor); });
}

inline void check_without_gradient(std::string_view op, const char* name, const at::Tensor& tensor) {
  EDL_ENSURE(!tensor.requires_grad(), op, ": ", name, " have no gradient (got ", name, " with requires_grad = True)");
}

} // namespace edl
