#pragma once

// Products of matrices, C [m, n] (+)= A [m, k] B [k, n], from blocks that fit the caches:
//
//            panel of B: kDepth x 2 vectors, L1             Every multiply-add is one of the accumulation type (float,
//                     |                                     or double for double): 16-bit storage is widened while it
//   A: kBlockRows  ┌──▼──┬─────┬─────┐                      is packed. An entry of C is one chain of additions in the
//   x kDepth, L2 ─►│tile │  C  │     │                      order of k, whatever the blocks, the tile that holds it and
//                  └─────┴─────┴─────┘                      the thread, so results do not depend on any of them.
//                   kTileRows x 2 vectors, registers
//
// Cost of a tile per k: 2 · rows multiply-adds of a vector, rows + 2 loads. Packing: a load and a store per vector, and
// 3 shuffles more where it transposes.

#include <algorithm>
#include <cstdint>
#include <utility>

#include "cpu/isa/simd.h"

namespace edl::cpu::EDL_ISA {
namespace {

#if EDL_VECTOR_BYTES == 64
constexpr int64_t kTileRows = 14; // 28 of 32 registers hold sums
#else
constexpr int64_t kTileRows = 6; //  12 of 16
#endif
template <typename Acc>
constexpr int64_t kTileColumns = 2 * kLanes<Acc>;

// ---- one tile ----

// Where a(m, k) stands: a[m * stride + k], or a[k * stride + m].
enum class Layout { rows, columns };

// C [rows, kTileColumns] = or += A B, with b(k, n) at b[k * b_stride + n].
template <int64_t rows, Layout layout, typename Acc>
__attribute__((noinline)) void tile(
    int64_t depth,
    const Acc* a,
    int64_t a_stride,
    const Acc* b,
    int64_t b_stride,
    Acc* c,
    int64_t c_stride,
    bool accumulate) {
  constexpr int64_t lanes = kLanes<Acc>;
  Vector<Acc> sums[rows][2];
#pragma GCC unroll 16
  for (int64_t m = 0; m < rows; ++m) {
#pragma GCC unroll 2
    for (int64_t v = 0; v < 2; ++v) {
      sums[m][v] = accumulate ? load(c + m * c_stride + v * lanes) : Vector<Acc>{};
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    const Vector<Acc> left = load(b), right = load(b + lanes);
#pragma GCC unroll 16
    for (int64_t m = 0; m < rows; ++m) {
      const Acc factor = layout == Layout::rows ? a[m * a_stride] : a[m];
      sums[m][0] += factor * left;
      sums[m][1] += factor * right;
    }
    a += layout == Layout::rows ? 1 : a_stride;
    b += b_stride;
  }
#pragma GCC unroll 16
  for (int64_t m = 0; m < rows; ++m) {
#pragma GCC unroll 2
    for (int64_t v = 0; v < 2; ++v) {
      store(sums[m][v], c + m * c_stride + v * lanes);
    }
  }
}

template <typename Acc>
using Tile = void (*)(int64_t, const Acc*, int64_t, const Acc*, int64_t, Acc*, int64_t, bool);

template <Layout layout, typename Acc, int64_t... i>
Tile<Acc> tile_of(int64_t rows, std::integer_sequence<int64_t, i...>) {
  static constexpr Tile<Acc> tiles[] = {tile<i + 1, layout, Acc>...};
  return tiles[rows - 1];
}

// ---- a block ----

template <Layout layout, typename Acc>
struct Left {
  const Acc* data;
  int64_t stride;

  const Acc* row(int64_t m) const {
    return layout == Layout::rows ? data + m * stride : data + m;
  }
};

// The last, incomplete panel: its columns of C go through a tile of their own.
template <typename Acc>
void edge_tile(
    Tile<Acc> tile,
    int64_t rows,
    int64_t columns,
    int64_t depth,
    const Acc* a,
    int64_t a_stride,
    const Acc* b,
    Acc* c,
    int64_t c_stride,
    bool accumulate) {
  constexpr int64_t width = kTileColumns<Acc>;
  Acc own[kTileRows * width] = {};
  for (int64_t m = 0; accumulate && m < rows; ++m) {
    std::copy_n(c + m * c_stride, columns, own + m * width);
  }
  tile(depth, a, a_stride, b, width, own, width, accumulate);
  for (int64_t m = 0; m < rows; ++m) {
    std::copy_n(own + m * width, columns, c + m * c_stride);
  }
}

// C [rows, columns] = or += A B, with B in panels of [depth, kTileColumns]. Rows are shared out evenly among the tiles.
template <Layout layout, typename Acc>
void multiply(
    Left<layout, Acc> a,
    const Acc* b,
    int64_t rows,
    int64_t columns,
    int64_t depth,
    Acc* c,
    int64_t c_stride,
    bool accumulate) {
  constexpr int64_t width = kTileColumns<Acc>;
  const int64_t groups = (rows + kTileRows - 1) / kTileRows;
  for (int64_t n = 0; n < columns; n += width) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = rows * g / groups, count = rows * (g + 1) / groups - begin;
      const auto product = tile_of<layout, Acc>(count, std::make_integer_sequence<int64_t, kTileRows>());
      Acc* out = c + begin * c_stride + n;
      if (n + width <= columns) {
        product(depth, a.row(begin), a.stride, b, width, out, c_stride, accumulate);
      } else {
        edge_tile(product, count, columns - n, depth, a.row(begin), a.stride, b, out, c_stride, accumulate);
      }
    }
    b += depth * width;
  }
}

// ---- packing ----

template <typename Storage, typename Acc>
EDL_INLINE void copy_row(const Storage* from, int64_t count, Acc* to) {
  int64_t i = 0;
  for (; i + kLanes<Acc> <= count; i += kLanes<Acc>) {
    store(load(from + i), to + i);
  }
  for (; i < count; ++i) {
    to[i] = widen(from[i]);
  }
}

// to [depth, kTileColumns] in panels = from [depth, columns], whose row k begins at row(k). Missing columns are zeros.
template <typename Row, typename Acc>
EDL_INLINE void pack_panels(Row row, int64_t depth, int64_t columns, Acc* to) {
  constexpr int64_t width = kTileColumns<Acc>;
  for (int64_t k = 0; k < depth; ++k) {
    const auto* from = row(k);
    Acc* out = to + k * width;
    int64_t n = 0;
    for (; n + width <= columns; n += width, out += depth * width) {
      store(load(from + n), out);
      store(load(from + n + kLanes<Acc>), out + kLanes<Acc>);
    }
    for (int64_t i = n; i < round_up(columns, width); ++i) {
      out[i - n] = i < columns ? widen(from[i]) : Acc(0);
    }
  }
}

// to [depth, kTileColumns] in panels = the transpose of from [columns, depth]. Missing columns are zeros.
template <typename Storage, typename Acc>
void pack_transposed(const Storage* from, int64_t stride, int64_t depth, int64_t columns, Acc* to) {
  constexpr int64_t lanes = kLanes<Acc>, width = kTileColumns<Acc>;
  for (int64_t n = 0; n < round_up(columns, width); n += lanes) {
    Acc* out = to + n / width * depth * width + n % width;
    const int64_t present = std::clamp<int64_t>(columns - n, 0, lanes);
    int64_t k = 0;
    for (; k + lanes <= depth; k += lanes) {
      Vector<Acc> square[lanes];
      for (int64_t i = 0; i < lanes; ++i) {
        square[i] = i < present ? load(from + (n + i) * stride + k) : Vector<Acc>{};
      }
      transpose<1, Acc>(square);
      for (int64_t i = 0; i < lanes; ++i) {
        store(square[i], out + (k + i) * width);
      }
    }
    for (; k < depth; ++k) {
      for (int64_t i = 0; i < lanes; ++i) {
        out[k * width + i] = i < present ? widen(from[(n + i) * stride + k]) : Acc(0);
      }
    }
  }
}

} // namespace
} // namespace edl::cpu::EDL_ISA
