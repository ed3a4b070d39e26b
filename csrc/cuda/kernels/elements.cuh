#pragma once

// Elements of device memory: their types, packs of up to 16 bytes, and the conversion to and from the accumulation
// type.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <limits>

#include "common/cuda_launch.h"
#include "cuda/kernels/storage.h"

namespace edl::cuda {

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

template <typename Storage>
struct AccumulationOf {
  using type = float;
};
template <>
struct AccumulationOf<double> {
  using type = double;
};
template <typename Storage>
using Accumulation = typename AccumulationOf<Storage>::type;

__device__ inline float widen(float x) {
  return x;
}
__device__ inline double widen(double x) {
  return x;
}
__device__ inline float widen(BFloat16 x) {
  return __bfloat162float(x);
}
__device__ inline float widen(Float16 x) {
  return __half2float(x);
}

template <typename Storage>
__device__ inline Storage narrow(Accumulation<Storage> x) {
  return x;
}
template <>
__device__ inline BFloat16 narrow<BFloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline Float16 narrow<Float16>(float x) {
  return __float2half_rn(x);
}

template <typename Scalar>
inline constexpr Scalar kNan = std::numeric_limits<Scalar>::quiet_NaN();
template <typename Scalar>
inline constexpr Scalar kInfinity = std::numeric_limits<Scalar>::infinity();

// `width` neighbouring elements, read and written 16 bytes at a time.
template <typename Element, int width>
struct alignas(sizeof(Element) * width < 16 ? sizeof(Element) * width : 16) Pack {
  Element values[width];
};

template <int width, typename Element>
__device__ inline Pack<Element, width> load_pack(const Element* data) {
  return *reinterpret_cast<const Pack<Element, width>*>(data);
}
template <int width, typename Element>
__device__ inline void store_pack(const Pack<Element, width>& pack, Element* out) {
  *reinterpret_cast<Pack<Element, width>*>(out) = pack;
}

// How many elements of a storage type 16 bytes hold.
template <typename Storage>
inline constexpr int kPackWidth = 16 / static_cast<int>(sizeof(Storage));

// ids of int32 or int64.
struct Ids {
  const void* data;
  bool are_64_bit;
};

__device__ inline int64_t id_at(const Ids& ids, int64_t i) {
  return ids.are_64_bit ? static_cast<const int64_t*>(ids.data)[i] : static_cast<const int32_t*>(ids.data)[i];
}

// Calls `function.template operator()<Storage>()` with the element type that `type` names.
template <typename Function>
void with_storage(StorageType type, const Function& function) {
  switch (type) {
    case StorageType::float32:
      return function.template operator()<float>();
    case StorageType::float64:
      return function.template operator()<double>();
    case StorageType::bfloat16:
      return function.template operator()<BFloat16>();
    case StorageType::float16:
      return function.template operator()<Float16>();
  }
}

inline constexpr int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

} // namespace edl::cuda
