#pragma once

#include <ATen/core/Tensor.h>

// What an op needs of ATen/autocast_mode.h, which would bring all of ATen with it.
namespace at::autocast {
TORCH_API ScalarType get_autocast_dtype(DeviceType device_type);
TORCH_API Tensor cached_cast(ScalarType to_type, const Tensor& arg, DeviceType device_type);
} // namespace at::autocast
