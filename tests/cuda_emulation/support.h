#pragma once

// What every test of a kernel takes: memory of exactly the promised size, values, tolerances, and the run in several
// orders.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "catch.h"
#include "common/score_function.h"
#include "common/storage_type.h"
#include "emulation.h"
#include "memory.h"

namespace edl_tests {

using edl::Scores;
using edl::StorageType;
using Values = std::vector<double>; // also of integers

inline constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

enum class Element { float32, float64, bfloat16, float16, int32, int64, byte };

inline Element element_of(StorageType type) {
  return static_cast<Element>(type);
}
inline Element accumulation_of(StorageType type) {
  return type == StorageType::float64 ? Element::float64 : Element::float32;
}
inline Element ids_of(bool are_64_bit) {
  return are_64_bit ? Element::int64 : Element::int32;
}
inline int64_t size_of(Element element) {
  constexpr int64_t sizes[] = {4, 8, 2, 2, 4, 8, 1};
  return sizes[static_cast<int>(element)];
}

// A block of memory that ends where its last element does, `offset` elements after an address that is a multiple of 16.
class Buffer {
 public:
  static Buffer input(const char* name, Element element, const Values& values, int64_t offset = 0) {
    return Buffer(name, element, values, offset, edl_emulation::Contents::input);
  }
  // Read and written.
  static Buffer changed(const char* name, Element element, const Values& values, int64_t offset = 0) {
    return Buffer(name, element, values, offset, edl_emulation::Contents::defined);
  }
  // Poisoned before every run.
  static Buffer output(const char* name, Element element, int64_t count, int64_t offset = 0) {
    return Buffer(name, element, Values(count), offset, edl_emulation::Contents::undefined);
  }

  Buffer(const Buffer&) = delete;
  ~Buffer() {
    edl_emulation::remove_memory(data_);
    std::free(block_);
  }

  void* data() const {
    return data_;
  }
  template <typename Type>
  Type* as() const {
    return static_cast<Type*>(data());
  }

  Values values() const {
    Values values(count_);
    for (int64_t i = 0; i < count_; ++i) {
      values[i] = get(i);
    }
    return values;
  }
  std::vector<char> bytes() const {
    return {data_, data_ + count_ * size_of(element_)};
  }

  // As it was made; without contents, poison.
  void reset(uint64_t seed) {
    if (contents_ == edl_emulation::Contents::undefined) {
      edl_emulation::poison(data_, count_ * size_of(element_), seed);
    } else {
      std::copy(initial_.begin(), initial_.end(), data_);
    }
    edl_emulation::set_contents(data_, contents_);
  }

 private:
  Buffer(const char* name, Element element, const Values& values, int64_t offset, edl_emulation::Contents contents)
      : element_(element), count_(values.size()), contents_(contents) {
    const int64_t bytes = (count_ + offset) * size_of(element);
    if (posix_memalign(&block_, 16, std::max<int64_t>(bytes, 1)) != 0) {
      throw std::bad_alloc();
    }
    data_ = static_cast<char*>(block_) + offset * size_of(element);
    for (int64_t i = 0; i < count_; ++i) {
      set(i, values[i]);
    }
    initial_ = this->bytes();
    edl_emulation::add_memory(name, data_, count_ * size_of(element));
    edl_emulation::set_contents(data_, contents);
  }

  template <typename Type>
  Type at(int64_t i) const {
    Type value;
    std::memcpy(&value, data_ + i * sizeof(Type), sizeof(Type));
    return value;
  }
  template <typename Type>
  void put(int64_t i, Type value) {
    std::memcpy(data_ + i * sizeof(Type), &value, sizeof(Type));
  }

  double get(int64_t i) const {
    switch (element_) {
      case Element::float32:
        return at<float>(i);
      case Element::float64:
        return at<double>(i);
      case Element::bfloat16:
        return __bfloat162float(at<__nv_bfloat16>(i));
      case Element::float16:
        return __half2float(at<__half>(i));
      case Element::int32:
        return at<int32_t>(i);
      case Element::int64:
        return static_cast<double>(at<int64_t>(i));
      case Element::byte:
        return at<uint8_t>(i);
    }
    return 0;
  }
  void set(int64_t i, double value) {
    switch (element_) {
      case Element::float32:
        return put(i, static_cast<float>(value));
      case Element::float64:
        return put(i, value);
      case Element::bfloat16:
        return put(i, __float2bfloat16_rn(static_cast<float>(value)));
      case Element::float16:
        return put(i, __float2half_rn(static_cast<float>(value)));
      case Element::int32:
        return put(i, static_cast<int32_t>(value));
      case Element::int64:
        return put(i, static_cast<int64_t>(value));
      case Element::byte:
        return put(i, static_cast<uint8_t>(value));
    }
  }

  Element element_;
  int64_t count_;
  edl_emulation::Contents contents_;
  void* block_ = nullptr;
  char* data_;
  std::vector<char> initial_;
};

using edl_emulation::Order;

// Where accesses are checked, the order matters less.
inline std::vector<Order> every_order() {
  return edl_emulation::accesses_are_checked() ? std::vector<Order>{Order::forward, Order::random}
                                               : std::vector<Order>{Order::forward, Order::reversed, Order::random};
}

// Runs `launch` with threads and blocks in several orders; all must leave the same bits in `results`. What is in
// `scratch` may differ.
inline void run(
    const std::vector<Buffer*>& results,
    const std::vector<Buffer*>& scratch,
    const std::function<void()>& launch,
    const std::vector<Order>& orders = every_order()) {
  std::vector<std::vector<char>> first;
  uint64_t seed = 0;
  for (const Order order : orders) {
    edl_emulation::set_order(order, ++seed);
    for (const std::vector<Buffer*>* buffers : {&results, &scratch}) {
      for (Buffer* buffer : *buffers) {
        buffer->reset(seed);
      }
    }
    launch();
    std::vector<std::vector<char>> bits;
    for (const Buffer* result : results) {
      bits.push_back(result->bytes());
    }
    if (first.empty()) {
      first = bits;
    }
    const bool same_bits_as_in_forward_order = bits == first;
    CATCH_REQUIRE(same_bits_as_in_forward_order);
  }
}

inline Values random_values(int64_t count, double scale, uint64_t seed) {
  std::mt19937_64 generator(seed);
  std::normal_distribution<double> normal(0, scale);
  Values values(count);
  for (double& value : values) {
    value = normal(generator);
  }
  return values;
}

// Whole numbers in [low, high].
inline Values random_ids(int64_t count, int64_t low, int64_t high, uint64_t seed) {
  std::mt19937_64 generator(seed);
  Values values(count);
  for (double& value : values) {
    value = static_cast<double>(low + static_cast<int64_t>(generator() % static_cast<uint64_t>(high - low + 1)));
  }
  return values;
}

inline double epsilon_of(Element element) {
  constexpr int bits[] = {23, 52, 7, 10};
  return std::ldexp(1.0, -bits[static_cast<int>(element)]);
}

// As in tests/tolerances.py: roundings to the element, and those of the accumulation, which add up like a random walk.
inline double tolerance(Element element, Element accumulation, int64_t length, int roundings = 1) {
  return roundings * epsilon_of(element) + 8 * epsilon_of(accumulation) * std::sqrt(static_cast<double>(length + 1));
}

// Holds `actual` to `relative` of the largest expected value, or of `scale` where that is larger. NaN must stand alike.
inline void check_close(const Values& actual, const Values& expected, double relative, double scale = 0) {
  CATCH_REQUIRE(actual.size() == expected.size());
  double largest = scale;
  for (const double value : expected) {
    largest = std::isfinite(value) ? std::max(largest, std::abs(value)) : largest;
  }
  for (size_t i = 0; i < expected.size(); ++i) {
    const bool close = std::isnan(expected[i]) ? std::isnan(actual[i])
        : std::isinf(expected[i])              ? actual[i] == expected[i]
                                               : std::abs(actual[i] - expected[i]) <= relative * largest;
    if (!close) {
      CATCH_CAPTURE(i, actual[i], expected[i], relative * largest);
      CATCH_REQUIRE(close);
    }
  }
  CATCH_CHECK(true);
}

// The distribution over experts that a row of logits stands for.
inline Values score(const Values& logits, Scores scores) {
  Values result = logits;
  if (scores == Scores::none) {
    return result;
  }
  const double highest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (double& x : result) {
    x = scores == Scores::softmax ? std::exp(x - highest) : 1 / (1 + std::exp(-x));
    sum += x;
  }
  sum += scores == Scores::softmax ? 0 : 1e-20;
  for (double& x : result) {
    x /= sum;
  }
  return result;
}

inline Values row_of(const Values& matrix, int64_t row, int64_t stride, int64_t length) {
  return {matrix.begin() + row * stride, matrix.begin() + row * stride + length};
}

inline const StorageType kStorages[] = {
    StorageType::float32, StorageType::float64, StorageType::bfloat16, StorageType::float16};

} // namespace edl_tests
