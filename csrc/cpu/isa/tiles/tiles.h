#pragma once

// The instructions of a matrix unit (AMX): eight registers, tiles, of 16 rows of 64 bytes; a thread names their sizes
// before it uses them. EDL_TILE_STAND_IN puts plain C++ in the place of the instructions, bit for bit, for tests on
// other processors. No external linkage.
//
// What a product adds, in this order: with e = o = 0, for the 16 pairs k of a row of A and of a column of B
//     e = fma(a[2k], b[2k], e),   o = fma(a[2k + 1], b[2k + 1], o),   and then   c = c + (e + o),
// each rounded to float32; denormal numbers count as zeros, operands and results. So 32 terms are added before they
// meet C.

#include <cstdint>
#include <cstring>

#include "cpu/isa/simd.h"

namespace edl::cpu::EDL_ISA {
namespace {

constexpr int64_t kTileRows = 16; //   rows of a tile, and its columns of float32
constexpr int64_t kTileDepth = 32; //  numbers of bfloat16 in a row of a tile

// What `ldtilecfg` reads.
struct alignas(64) TileConfiguration {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfiguration) == 64);

#if defined(EDL_TILE_STAND_IN)

struct Tile {
  alignas(64) uint8_t rows[kTileRows][64];
};
thread_local TileConfiguration configuration_in_use{.palette = 0};
thread_local Tile tiles[8];

inline TileConfiguration configuration_of_tiles() {
  return configuration_in_use;
}
inline void configure_tiles(const TileConfiguration& configuration) {
  configuration_in_use = configuration;
  std::memset(tiles, 0, sizeof(tiles));
}
inline void release_tiles() {
  configuration_in_use = TileConfiguration{.palette = 0};
}

template <int tile>
void zero_tile() {
  std::memset(&tiles[tile], 0, sizeof(Tile));
}
template <int tile>
void load_tile(const void* from, int64_t stride) {
  for (int64_t row = 0; row < kTileRows; ++row) {
    std::memcpy(tiles[tile].rows[row], static_cast<const char*>(from) + row * stride, 64);
  }
}
template <int tile>
void store_tile(void* to, int64_t stride) {
  for (int64_t row = 0; row < kTileRows; ++row) {
    std::memcpy(static_cast<char*>(to) + row * stride, tiles[tile].rows[row], 64);
  }
}

// `x` holds a sum that double has exactly, or beyond doubt on its side of every boundary of float32: products of two
// bfloat16 have 16 bits.
inline float rounded(double x) {
  const double smallest = 0x1.ffffffp-127; // rounds to the smallest normal number, where the exponent has no end
  return x < smallest && x > -smallest ? (std::signbit(x) ? -0.0f : 0.0f) : static_cast<float>(x);
}
inline double operand(BFloat16 x) {
  return (x.bits & 0x7f80u) == 0 ? ((x.bits & 0x8000u) != 0 ? -0.0 : 0.0) : static_cast<double>(widen(x));
}

template <int c, int a, int b>
void multiply_tiles() {
  double right[kTileRows][2][kTileRows]; // of the pairs: [k][which][column]
  for (int64_t k = 0; k < kTileRows; ++k) {
    for (int64_t n = 0; n < kTileRows; ++n) {
      BFloat16 pair[2];
      std::memcpy(pair, tiles[b].rows[k] + 4 * n, 4);
      right[k][0][n] = operand(pair[0]);
      right[k][1][n] = operand(pair[1]);
    }
  }
  for (int64_t m = 0; m < kTileRows; ++m) {
    float sums[2][kTileRows] = {};
    for (int64_t k = 0; k < kTileRows; ++k) {
      BFloat16 pair[2];
      std::memcpy(pair, tiles[a].rows[m] + 4 * k, 4);
      for (int64_t which = 0; which < 2; ++which) {
        const double left = operand(pair[which]);
        for (int64_t n = 0; n < kTileRows; ++n) {
          sums[which][n] = rounded(left * right[k][which][n] + sums[which][n]);
        }
      }
    }
    float row[kTileRows];
    std::memcpy(row, tiles[c].rows[m], sizeof(row));
    for (int64_t n = 0; n < kTileRows; ++n) {
      const float both = rounded(static_cast<double>(sums[0][n]) + sums[1][n]);
      row[n] = rounded(static_cast<double>(rounded(row[n])) + both);
    }
    std::memcpy(tiles[c].rows[m], row, sizeof(row));
  }
}

#else

// Compilers' own functions want literals, and GCC 12's `_tile_loadconfig` says that it reads 8 bytes, so that the other
// 56 need not be written before it.
inline TileConfiguration configuration_of_tiles() {
  TileConfiguration found;
  asm volatile("sttilecfg %0" : "=m"(found));
  return found;
}
inline void configure_tiles(const TileConfiguration& configuration) {
  asm volatile("ldtilecfg %0" : : "m"(configuration));
}
inline void release_tiles() {
  asm volatile("tilerelease");
}

template <int tile>
EDL_INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(tile));
}
template <int tile>
EDL_INLINE void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
EDL_INLINE void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(tile) : "memory");
}
template <int c, int a, int b>
EDL_INLINE void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c0, %%tmm%c1, %%tmm%c2" : : "i"(b), "i"(a), "i"(c));
}

#endif

} // namespace
} // namespace edl::cpu::EDL_ISA
