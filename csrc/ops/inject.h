#pragma once

#include <ATen/core/Tensor.h>

#include "edl/inject.h"

namespace edl {

void check_inject(const at::Tensor& carrier, const at::Tensor& loss, const at::Tensor& scale);

} // namespace edl
