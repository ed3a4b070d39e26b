#pragma once

#include <ATen/core/Tensor.h>

#include "edl/export.h"

namespace edl {

// Returns a copy of `carrier` that carries a loss: in the backward pass the carrier's gradient passes unchanged, and
// `loss` receives the gradient `scale`, whatever the carrier's is. For losses that cannot be returned (pipeline
// stages): attach them to a small tensor that the final loss depends on, such as the routing weights.
EDL_API at::Tensor inject(
    const at::Tensor& carrier, // any shape
    const at::Tensor& loss, //    [] scalar
    const at::Tensor& scale); //  [] scalar, on any device; the factor of a gradient scaler, or 1

} // namespace edl
