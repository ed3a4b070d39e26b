// The stand-in of the tile instructions against their definition, and against the instructions where they are.
#include <array>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <random>

#include "catch.h"
#include "tile_product.h"

namespace {

struct Tiles {
  alignas(64) std::array<uint16_t, 512> a, b;
  alignas(64) std::array<float, 256> c;
};

enum class Magnitudes { realistic, any };

uint16_t random_number(std::mt19937& generator, Magnitudes magnitudes) {
  if (magnitudes == Magnitudes::any) { // every bit pattern: denormal, infinite, NaN
    return static_cast<uint16_t>(generator());
  }
  const float value = std::normal_distribution<float>()(generator);
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<uint16_t>(bits >> 16);
}

Tiles random_tiles(std::mt19937& generator, Magnitudes magnitudes) {
  Tiles tiles;
  for (auto* matrix : {&tiles.a, &tiles.b}) {
    for (uint16_t& number : *matrix) {
      number = random_number(generator, magnitudes);
    }
  }
  for (float& sum : tiles.c) {
    const uint32_t bits = static_cast<uint32_t>(random_number(generator, magnitudes)) << 16 | (generator() & 0xffffu);
    std::memcpy(&sum, &bits, sizeof(sum));
  }
  return tiles;
}

float flushed(float x) {
  return std::fabs(x) < FLT_MIN ? std::copysign(0.0f, x) : x;
}

float widened(uint16_t number) {
  const uint32_t bits = static_cast<uint32_t>(number) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return flushed(value);
}

// As the head of tiles.h says it.
void by_definition(Tiles& tiles) {
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 16; ++n) {
      float sums[2] = {};
      for (int k = 0; k < 16; ++k) {
        for (int which = 0; which < 2; ++which) {
          const float left = widened(tiles.a[m * 32 + 2 * k + which]);
          const float right = widened(tiles.b[k * 32 + 2 * n + which]);
          sums[which] = flushed(std::fma(left, right, sums[which]));
        }
      }
      float& c = tiles.c[m * 16 + n];
      c = flushed(flushed(c) + flushed(sums[0] + sums[1]));
    }
  }
}

int different(const Tiles& x, const Tiles& y) {
  int count = 0;
  for (int i = 0; i < 256; ++i) {
    const bool both_nan = std::isnan(x.c[i]) && std::isnan(y.c[i]);
    count += !both_nan && std::memcmp(&x.c[i], &y.c[i], sizeof(float)) != 0;
  }
  return count;
}

} // namespace

CATCH_TEST_CASE("the stand-in of tiles multiplies as their instructions are defined") {
  std::mt19937 generator(1);
  for (const Magnitudes magnitudes : {Magnitudes::realistic, Magnitudes::any}) {
    for (int i = 0; i < 50; ++i) {
      Tiles actual = random_tiles(generator, magnitudes), wanted = actual;
      edl::cpu::tile_stand_in::tile_product(actual.a.data(), actual.b.data(), actual.c.data());
      by_definition(wanted);
      CATCH_CHECK(different(actual, wanted) == 0);
    }
  }
}

CATCH_TEST_CASE("the instructions of tiles multiply as their stand-in") {
  if (!may_use_tiles()) {
    CATCH_WARN("needs a processor with AMX, and the system's permission");
    return;
  }
#if defined(EDL_WITH_AMX)
  std::mt19937 generator(2);
  for (const Magnitudes magnitudes : {Magnitudes::realistic, Magnitudes::any}) {
    for (int i = 0; i < 500; ++i) {
      Tiles actual = random_tiles(generator, magnitudes), wanted = actual;
      edl::cpu::avx512_amx::tile_product(actual.a.data(), actual.b.data(), actual.c.data());
      edl::cpu::tile_stand_in::tile_product(wanted.a.data(), wanted.b.data(), wanted.c.data());
      CATCH_CHECK(different(actual, wanted) == 0);
    }
  }
#endif
}
