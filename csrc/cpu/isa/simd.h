#pragma once

// Vectors of EDL_VECTOR_BYTES for the sources of this folder, on the compiler's vector extension: element-wise
// operators come from the language, and each instruction set compiles the same text. No torch header, no external
// linkage.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace edl::cpu::EDL_ISA {
namespace {

#define EDL_INLINE inline __attribute__((always_inline))
#define EDL_FLATTEN __attribute__((flatten)) // everything called inside is inlined, lambdas too

template <typename Scalar>
struct VectorOf {
  typedef Scalar type __attribute__((vector_size(EDL_VECTOR_BYTES)));
};
template <typename Scalar>
using Vector = typename VectorOf<Scalar>::type;
using Floats = Vector<float>;
using Doubles = Vector<double>;
using Int32s = Vector<int32_t>;
using Int64s = Vector<int64_t>;

template <typename Scalar>
inline constexpr int64_t kLanes = EDL_VECTOR_BYTES / static_cast<int64_t>(sizeof(Scalar));

// Storage types of 16 bits, named so that templates can tell them apart.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

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

constexpr int64_t round_up(int64_t n, int64_t unit) {
  return (n + unit - 1) / unit * unit;
}

template <typename Scalar>
EDL_INLINE Vector<Scalar> broadcast(Scalar value) {
  return Vector<Scalar>{} + value;
}

// ---- 16-bit storage, one element at a time (tails, and whole rows where there is no instruction) ----

EDL_INLINE float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

EDL_INLINE float widen(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  float value;
  if (magnitude >= 0x7c00u) { // infinity, NaN
    const uint32_t bits = sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13);
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
  // The exponent is off by 127 - 15; a product repairs it, and normalises subnormal numbers on the way.
  const uint32_t bits = magnitude << 13;
  std::memcpy(&value, &bits, sizeof(value));
  value *= 0x1p+112f;
  return sign != 0 ? -value : value;
}

EDL_INLINE float widen(float x) {
  return x;
}
EDL_INLINE double widen(double x) {
  return x;
}

// Round to nearest, ties to even.
EDL_INLINE void narrow(float value, BFloat16* out) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (value != value) {
    out->bits = 0x7fc0;
  } else {
    out->bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
}

EDL_INLINE void narrow(float value, Float16* out) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t sign = (bits >> 16) & 0x8000u;
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    out->bits = static_cast<uint16_t>(sign | 0x7e00u);
  } else if (magnitude >= 0x477ff000u) { // rounds to 65536 or more
    out->bits = static_cast<uint16_t>(sign | 0x7c00u);
  } else if (magnitude < 0x38800000u) { // subnormal in float16: let the adder of float32 do the rounding
    float shifted;
    std::memcpy(&shifted, &magnitude, sizeof(shifted));
    shifted += 0.5f;
    uint32_t shifted_bits;
    std::memcpy(&shifted_bits, &shifted, sizeof(shifted_bits));
    out->bits = static_cast<uint16_t>(sign | (shifted_bits - 0x3f000000u));
  } else {
    magnitude += 0xc8000000u + 0xfffu + ((magnitude >> 13) & 1u);
    out->bits = static_cast<uint16_t>(sign | (magnitude >> 13));
  }
}

EDL_INLINE void narrow(float value, float* out) {
  *out = value;
}
EDL_INLINE void narrow(double value, double* out) {
  *out = value;
}

// ---- a whole vector ----

EDL_INLINE Floats load(const float* data) {
  Floats x;
  std::memcpy(&x, data, sizeof(x));
  return x;
}
EDL_INLINE Doubles load(const double* data) {
  Doubles x;
  std::memcpy(&x, data, sizeof(x));
  return x;
}
EDL_INLINE Floats load(const BFloat16* data) {
  typedef uint16_t Half __attribute__((vector_size(EDL_VECTOR_BYTES / 2)));
  Half half;
  std::memcpy(&half, data, sizeof(half));
  typedef uint32_t Whole __attribute__((vector_size(EDL_VECTOR_BYTES)));
  const Whole whole = __builtin_convertvector(half, Whole) << 16;
  Floats x;
  std::memcpy(&x, &whole, sizeof(x));
  return x;
}
EDL_INLINE Floats load(const Float16* data) {
  Floats x;
#if EDL_VECTOR_BYTES == 64 && defined(__AVX512F__)
  const __m512 wide = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(data)));
  std::memcpy(&x, &wide, sizeof(x));
#elif EDL_VECTOR_BYTES == 32 && defined(__AVX2__)
  const __m256 wide = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data)));
  std::memcpy(&x, &wide, sizeof(x));
#else
  for (int64_t lane = 0; lane < kLanes<float>; ++lane) {
    x[lane] = widen(data[lane]);
  }
#endif
  return x;
}

EDL_INLINE void store(Floats x, float* out) {
  std::memcpy(out, &x, sizeof(x));
}
EDL_INLINE void store(Doubles x, double* out) {
  std::memcpy(out, &x, sizeof(x));
}
EDL_INLINE void store(Floats x, BFloat16* out) {
  typedef uint32_t Whole __attribute__((vector_size(EDL_VECTOR_BYTES)));
  typedef uint16_t Half __attribute__((vector_size(EDL_VECTOR_BYTES / 2)));
  Whole bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const Whole rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Whole nan = reinterpret_cast<Whole>(x != x);
  const Half half = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0u), Half);
  std::memcpy(out, &half, sizeof(half));
}
EDL_INLINE void store(Floats x, Float16* out) {
#if EDL_VECTOR_BYTES == 64 && defined(__AVX512F__)
  __m512 wide;
  std::memcpy(&wide, &x, sizeof(wide));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT));
#elif EDL_VECTOR_BYTES == 32 && defined(__AVX2__)
  __m256 wide;
  std::memcpy(&wide, &x, sizeof(wide));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int64_t lane = 0; lane < kLanes<float>; ++lane) {
    narrow(x[lane], out + lane);
  }
#endif
}

// The last, incomplete vector of a row of storage goes through a buffer.
template <typename Acc, typename Storage>
EDL_INLINE Vector<Acc> load_some(const Storage* data, int64_t count) {
  if (count >= kLanes<Acc>) {
    return load(data);
  }
  Vector<Acc> x{};
  for (int64_t lane = 0; lane < count; ++lane) {
    x[lane] = widen(data[lane]);
  }
  return x;
}

template <typename Acc, typename Storage>
EDL_INLINE void store_some(Vector<Acc> x, int64_t count, Storage* out) {
  if (count >= kLanes<Acc>) {
    store(x, out);
    return;
  }
  for (int64_t lane = 0; lane < count; ++lane) {
    narrow(x[lane], out + lane);
  }
}

// Stores past the caches: for outputs larger than them, it saves reading each line before it is overwritten.
// `out` is aligned to the vector. Call `stream_fence` before another thread reads.
EDL_INLINE void stream(Floats x, float* out) {
#if EDL_VECTOR_BYTES == 64 && defined(__AVX512F__)
  __m512 wide;
  std::memcpy(&wide, &x, sizeof(wide));
  _mm512_stream_ps(out, wide);
#elif EDL_VECTOR_BYTES == 32 && defined(__AVX2__)
  __m256 wide;
  std::memcpy(&wide, &x, sizeof(wide));
  _mm256_stream_ps(out, wide);
#else
  store(x, out);
#endif
}
template <typename Values, typename Storage>
EDL_INLINE void stream(Values x, Storage* out) {
  store(x, out);
}
EDL_INLINE void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// ---- across lanes ----

// b where either is NaN.
template <typename Scalar>
EDL_INLINE Vector<Scalar> maximum(Vector<Scalar> a, Vector<Scalar> b) {
#if EDL_VECTOR_BYTES == 32 // the compiler sees the instruction only where neither is a constant
  if constexpr (sizeof(Scalar) == 4) {
    __m256 x, y;
    std::memcpy(&x, &a, sizeof(x));
    std::memcpy(&y, &b, sizeof(y));
    x = _mm256_max_ps(x, y);
    std::memcpy(&a, &x, sizeof(x));
    return a;
  }
#endif
  return a > b ? a : b;
}
template <typename Scalar>
EDL_INLINE Vector<Scalar> minimum(Vector<Scalar> a, Vector<Scalar> b) {
  return a < b ? a : b;
}

// Folds a vector by halves down to 16 bytes, then lane by lane: the same order in every build of one width.
template <typename Scalar, int64_t bytes, typename Combine>
EDL_INLINE Scalar fold(const Scalar* lanes, Combine combine) {
  if constexpr (bytes > 16) {
    typedef Scalar Half __attribute__((vector_size(bytes / 2)));
    Half low, high;
    std::memcpy(&low, lanes, sizeof(low));
    std::memcpy(&high, lanes + sizeof(low) / sizeof(Scalar), sizeof(high));
    const Half both = combine(low, high);
    Scalar half[sizeof(Half) / sizeof(Scalar)];
    std::memcpy(half, &both, sizeof(both));
    return fold<Scalar, bytes / 2>(half, combine);
  } else if constexpr (sizeof(Scalar) == 8) {
    return combine(lanes[0], lanes[1]);
  } else {
    return combine(combine(lanes[0], lanes[2]), combine(lanes[1], lanes[3]));
  }
}

template <typename Scalar>
EDL_INLINE Scalar sum_of(Vector<Scalar> x) {
  Scalar lanes[kLanes<Scalar>];
  std::memcpy(lanes, &x, sizeof(x));
  return fold<Scalar, EDL_VECTOR_BYTES>(lanes, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
}

template <typename Scalar>
EDL_INLINE Scalar max_of(Vector<Scalar> x) {
  Scalar lanes[kLanes<Scalar>];
  std::memcpy(lanes, &x, sizeof(x));
  return fold<Scalar, EDL_VECTOR_BYTES>(
      lanes, [](auto a, auto b) __attribute__((always_inline)) { return a > b ? a : b; });
}

// Exchanges blocks of `step` entries between two vectors: low = the even blocks of a and b, high = the odd ones.
template <int64_t step, typename Values, size_t... i>
EDL_INLINE void exchange(Values& a, Values& b, std::index_sequence<i...>) {
  constexpr int64_t lanes = sizeof...(i);
  const Values low = __builtin_shufflevector(a, b, (i & step ? lanes + i - step : i)...);
  const Values high = __builtin_shufflevector(a, b, (i & step ? lanes + i : i + step)...);
  a = low;
  b = high;
}

// The transpose of a square of vectors.
template <int64_t step, typename Scalar>
EDL_INLINE void transpose(Vector<Scalar>* x) {
  constexpr int64_t lanes = kLanes<Scalar>;
  if constexpr (step < lanes) {
    for (int64_t i = 0; i < lanes; ++i) {
      if ((i & step) == 0) {
        exchange<step>(x[i], x[i + step], std::make_index_sequence<lanes>());
      }
    }
    transpose<2 * step, Scalar>(x);
  }
}

// ---- exp and log ----

// step(0), step(1) … step(count - 1), written out. Functions of several vectors go step by step through all of them: a
// processor does not look far enough ahead to overlap whole chains of its own.
template <int count, typename Step>
EDL_INLINE void each(Step step) {
  [&]<int... i>(std::integer_sequence<int, i...>)
      __attribute__((always_inline)) { (step(i), ...); }(std::make_integer_sequence<int, count>{});
}

// exp of `count` vectors, in place, for x <= 88: error below 1 unit in the last place; 0 below -87.7; NaN stays NaN.
template <int count>
EDL_INLINE void exp_each(Floats* x) {
  const Floats lowest = broadcast(-88.0f);
  // Adding 1.5 * 2^23 rounds to an integer n; with 127 more its last bits are the exponent of 2^n, 0 (2^n = 0) at -127.
  const Floats shift = broadcast(12582912.0f + 127.0f);
  Floats shifted[count], r[count], p[count];
  each<count>([&](int i) { r[i] = maximum<float>(lowest, x[i]); });
  each<count>([&](int i) { shifted[i] = r[i] * 1.44269504f + shift; });
  each<count>([&](int i) { r[i] = r[i] - (shifted[i] - shift) * 0.693145752f; });
  each<count>([&](int i) { r[i] = r[i] - (shifted[i] - shift) * 1.42860677e-6f; });
  // 1 + r + r² q(r), q of least relative error (3e-9) for |r| <= log(2) / 2.
  each<count>([&](int i) { p[i] = r[i] * 1.3814467e-3f + 8.3687808e-3f; });
  each<count>([&](int i) { p[i] = p[i] * r[i] + 4.1668393e-2f; });
  each<count>([&](int i) { p[i] = p[i] * r[i] + 1.6666520e-1f; });
  each<count>([&](int i) { p[i] = p[i] * r[i] + 0.49999994f; });
  each<count>([&](int i) { p[i] = p[i] * r[i] + 1.0f; });
  each<count>([&](int i) { p[i] = p[i] * r[i] + 1.0f; });
  each<count>([&](int i) {
    Int32s bits;
    std::memcpy(&bits, &shifted[i], sizeof(bits));
    bits <<= 23;
    Floats scale;
    std::memcpy(&scale, &bits, sizeof(scale));
    x[i] = p[i] * scale;
  });
}

template <int count>
EDL_INLINE void exp_each(Doubles* x) {
  for (int i = 0; i < count; ++i) {
    for (int64_t lane = 0; lane < kLanes<double>; ++lane) {
      x[i][lane] = std::exp(x[i][lane]);
    }
  }
}

EDL_INLINE Floats exp_of(Floats x) {
  exp_each<1>(&x);
  return x;
}
EDL_INLINE Doubles exp_of(Doubles x) {
  for (int64_t lane = 0; lane < kLanes<double>; ++lane) {
    x[lane] = std::exp(x[lane]);
  }
  return x;
}

template <int count, typename Acc>
EDL_INLINE void sigmoid_each(Vector<Acc>* x) {
  Vector<Acc> decay[count];
  for (int i = 0; i < count; ++i) {
    decay[i] = x[i] < 0 ? x[i] : -x[i]; // exp(-|x|): no overflow on either side
  }
  exp_each<count>(decay);
  for (int i = 0; i < count; ++i) {
    x[i] = (x[i] < 0 ? decay[i] : broadcast<Acc>(1)) / (1 + decay[i]);
  }
}

template <typename Acc>
EDL_INLINE Vector<Acc> sigmoid_of(Vector<Acc> x) {
  sigmoid_each<1, Acc>(&x);
  return x;
}

// log of `count` vectors, in place, for normal positive x: error below 2e-16 + 2 units in the last place; NaN stays NaN.
template <int count>
EDL_INLINE void log_each(Doubles* x) {
  Int64s exponent[count];
  Doubles s[count], z[count], p[count];
  each<count>([&](int i) {
    Int64s bits;
    std::memcpy(&bits, &x[i], sizeof(bits));
    // x = 2^exponent * f with f in [sqrt(1/2), sqrt(2)).
    exponent[i] = (bits - 0x3fe6a09e667f3bcdLL) >> 52;
    const Int64s mantissa = bits - (exponent[i] << 52);
    Doubles f;
    std::memcpy(&f, &mantissa, sizeof(f));
    // log f = 2 atanh(s), s = (f - 1) / (f + 1), |s| < 0.1716.
    s[i] = (f - 1.0) / (f + 1.0);
  });
  each<count>([&](int i) { z[i] = s[i] * s[i]; });
  each<count>([&](int i) { p[i] = z[i] * (2.0 / 19) + 2.0 / 17; });
  each<count>([&](int i) { p[i] = p[i] * z[i] + 2.0 / 15; });
  each<count>([&](int i) { p[i] = p[i] * z[i] + 2.0 / 13; });
  each<count>([&](int i) { p[i] = p[i] * z[i] + 2.0 / 11; });
  each<count>([&](int i) { p[i] = p[i] * z[i] + 2.0 / 9; });
  each<count>([&](int i) { p[i] = p[i] * z[i] + 2.0 / 7; });
  each<count>([&](int i) { p[i] = p[i] * z[i] + 2.0 / 5; });
  each<count>([&](int i) { p[i] = p[i] * z[i] + 2.0 / 3; });
  each<count>([&](int i) {
    const Doubles log_f = s[i] * 2.0 + s[i] * z[i] * p[i];
    const Doubles n = __builtin_convertvector(exponent[i], Doubles);
    const Doubles result = n * 0.693147180369123816490 + (log_f + n * 1.90821492927058770002e-10);
    x[i] = x[i] != x[i] ? x[i] : result;
  });
}

} // namespace
} // namespace edl::cpu::EDL_ISA
