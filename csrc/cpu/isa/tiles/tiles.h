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

using Wide = double __attribute__((vector_size(kTileRows * sizeof(double))));
using Wide64 = int64_t __attribute__((vector_size(kTileRows * sizeof(int64_t))));

EDL_INLINE Wide wide(Floats x) {
  return __builtin_convertvector(x, Wide);
}

// `x` holds sums that double has exactly, or beyond doubt on their side of every boundary of float32: products of two
// bfloat16 have 16 bits.
EDL_INLINE Floats rounded(Wide x) {
  const double smallest = 0x1.ffffffp-127; // rounds to the smallest normal number, where the exponent has no end
  const Wide64 is_denormal = (x < smallest) & (x > -smallest);
  const Floats narrow = __builtin_convertvector(x, Floats);
  Int32s bits;
  std::memcpy(&bits, &narrow, sizeof(bits));
  bits &= ~__builtin_convertvector(is_denormal, Int32s) | INT32_MIN; // the sign stays
  Floats result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

// One of a row's pairs of bfloat16, denormal numbers as zeros.
EDL_INLINE Wide operands(const uint8_t* pairs, int64_t which) {
  Int32s bits;
  std::memcpy(&bits, pairs, sizeof(bits));
  bits = which == 0 ? bits << 16 : bits & ~0xffff;
  bits &= ((bits & 0x7f800000) != 0) | INT32_MIN;
  Floats x;
  std::memcpy(&x, &bits, sizeof(x));
  return wide(x);
}

// Whether a tile holds zeros and magnitudes from 2^-48 to 2^48 alone: then float32 has every product, and no sum of
// them is denormal.
inline bool is_moderate(const Tile& tile) {
  Int32s wrong{};
  for (const uint8_t* pairs : tile.rows) {
    Int32s bits;
    std::memcpy(&bits, pairs, sizeof(bits));
    for (int64_t which = 0; which < 2; ++which, bits >>= 16) {
      const Int32s exponent = (bits >> 7) & 0xff;
      wrong |= ((bits & 0x7fff) != 0) & ((exponent < 127 - 48) | (exponent > 127 + 48));
    }
  }
  int32_t any = 0;
  for (int64_t lane = 0; lane < kTileRows; ++lane) {
    any |= wrong[lane];
  }
  return any == 0;
}

EDL_INLINE Floats narrow(Wide x) {
  return __builtin_convertvector(x, Floats);
}

// even [16] + odd [16] of row m of A, in numbers wide enough for their products.
template <typename Values, typename Rounding>
EDL_INLINE Floats row_of_product(const uint8_t* pairs, const Values (*right)[2], Rounding rounding) {
  Floats even{}, odd{};
  const Wide first = operands(pairs, 0), second = operands(pairs, 1);
  for (int64_t k = 0; k < kTileRows; ++k) {
    even = rounding(first[k], right[k][0], even);
    odd = rounding(second[k], right[k][1], odd);
  }
  return rounded(wide(even) + wide(odd));
}

template <int c, int a, int b>
void multiply_tiles() {
  Wide right[kTileRows][2];
  Floats narrow_right[kTileRows][2];
  for (int64_t k = 0; k < kTileRows; ++k) {
    for (int64_t which = 0; which < 2; ++which) {
      right[k][which] = operands(tiles[b].rows[k], which);
      narrow_right[k][which] = narrow(right[k][which]);
    }
  }
  const bool moderate = is_moderate(tiles[a]) && is_moderate(tiles[b]);
  for (int64_t m = 0; m < kTileRows; ++m) {
    const uint8_t* pairs = tiles[a].rows[m];
    const Floats product = moderate
        ? row_of_product(
              pairs, narrow_right,
              [](double x, Floats y, Floats sum)
                  __attribute__((always_inline)) { return static_cast<float>(x) * y + sum; })
        : row_of_product(pairs, right, [](double x, Wide y, Floats sum) __attribute__((always_inline)) {
            return rounded(x * y + wide(sum));
          });
    Floats row;
    std::memcpy(&row, tiles[c].rows[m], sizeof(row));
    row = rounded(wide(rounded(wide(row))) + wide(product));
    std::memcpy(tiles[c].rows[m], &row, sizeof(row));
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
