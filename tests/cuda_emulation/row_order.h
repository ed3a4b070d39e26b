#pragma once

// Rows of tokens in the order of the experts, and the shapes of rows that kernels are tried with.

#include <algorithm>
#include <random>

#include "support.h"

namespace edl_tests {

// N rows of T tokens' K choices in a random order, two of them without a slot where `with_unknown`.
struct RowOrder {
  RowOrder(int64_t num_tokens, int64_t top_k, bool with_unknown) : top_k(top_k), slots(num_tokens * top_k) {
    for (size_t i = 0; i < slots.size(); ++i) {
      slots[i] = static_cast<double>(i);
    }
    std::shuffle(slots.begin(), slots.end(), std::mt19937(3));
    if (with_unknown) {
      slots[slots.size() / 3] = -1;
      slots[slots.size() / 2] = static_cast<double>(slots.size()); // outside
    }
  }
  int64_t size() const {
    return slots.size();
  }
  bool is_known(int64_t i) const {
    return slots[i] >= 0 && slots[i] < static_cast<double>(slots.size());
  }
  int64_t slot(int64_t i) const {
    return static_cast<int64_t>(slots[i]);
  }
  int64_t token(int64_t i) const {
    return slot(i) / top_k;
  }
  int64_t top_k;
  Values slots;
};

// Rows of `width` elements, `padding` between them, from an address `offset` elements past a multiple of 16.
struct Shape {
  int64_t width, padding, offset;
};
// Lanes with and without work; one round of 16-byte packs and several; rows that packs do not fit.
inline const Shape kShapes[] = {{1, 0, 0},  {7, 2, 0},   {40, 8, 0},  {40, 0, 1},
                                {45, 0, 0}, {264, 0, 0}, {600, 8, 0}, {48, 3, 0}};

inline Values padded(int64_t rows, const Shape& shape, uint64_t seed) {
  return random_values(rows * (shape.width + shape.padding), 1, seed);
}

} // namespace edl_tests
