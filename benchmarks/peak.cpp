// What a machine can reach, for peak.py: multiply-adds of float32 and of bfloat16 in GFLOP/s, memory in GB/s. Each
// function keeps that many threads of its own busy for about so many seconds.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

// The instructions for bfloat16 are in every build for x86-64, whatever processor it is made for; has_tiles() and
// has_dots() say who may run them.
#if defined(__linux__) && defined(__x86_64__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#define KNOWS_BFLOAT16 1
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kAccumulators = 24;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kAccumulators = 12;
#else
constexpr int kVectorBytes = 16, kAccumulators = 12;
#endif

typedef float Vector __attribute__((vector_size(kVectorBytes)));
using Clock = std::chrono::steady_clock;

namespace {

std::atomic<float> g_used; // results go here, so that no compiler leaves their computation out
volatile float g_half = 0.5f; // for the same reason no compiler may know it

// Units per nanosecond over all threads. `make()` gives a thread its work; each call of that returns its units.
template <typename Make>
double rate(int threads, double seconds, Make make) {
  std::vector<double> rates(threads);
  std::vector<std::thread> team;
  for (double& own : rates) {
    team.emplace_back([&own, &make, seconds] {
      auto work = make();
      const auto start = Clock::now();
      double units = 0, passed = 0;
      while (passed < seconds) {
        units += work();
        passed = std::chrono::duration<double>(Clock::now() - start).count();
      }
      own = units / passed * 1e-9;
    });
  }
  double total = 0;
  for (int i = 0; i < threads; ++i) {
    team[i].join();
    total += rates[i];
  }
  return total;
}

// Every accumulator is a chain of its own, so that the latency of one hides behind the others.
double multiply_add() {
  constexpr long kSteps = 20'000;
  Vector sums[kAccumulators];
  for (int i = 0; i < kAccumulators; ++i)
    sums[i] = Vector{} + static_cast<float>(i);
  const Vector factors = Vector{} + g_half, addends = Vector{} + g_half;
  for (long step = 0; step < kSteps; ++step) {
#pragma GCC unroll 32
    for (int i = 0; i < kAccumulators; ++i)
      sums[i] = sums[i] * factors + addends;
  }
  float total = 0;
  for (const Vector& sum : sums)
    total += sum[0];
  g_used.store(total, std::memory_order_relaxed);
  return 2.0 * kSteps * kAccumulators * (kVectorBytes / sizeof(float));
}

// Memory that this thread has written once.
std::vector<Vector> written(int64_t bytes) {
  constexpr float kNumber = 0x1.347f34p+0f; // two equal numbers of bfloat16
  return std::vector<Vector>(bytes / sizeof(Vector), Vector{} + kNumber);
}

enum class Traffic { read, write, copy };

// Returns the bytes that it moved. Ordinary stores: without the barriers they would become memset and memcpy, which
// stream past the caches.
double pass(Traffic kind, const std::vector<Vector>& from, std::vector<Vector>& to) {
  const int64_t size = std::max(from.size(), to.size());
  if (kind == Traffic::read) {
    Vector sums[8] = {};
    for (int64_t i = 0; i + 8 <= size; i += 8) {
#pragma GCC unroll 8
      for (int64_t j = 0; j < 8; ++j)
        sums[j] += from[i + j];
    }
    for (const Vector& sum : sums)
      g_used.store(sum[0], std::memory_order_relaxed);
  } else {
    for (int64_t i = 0; i < size; ++i) {
      to[i] = kind == Traffic::copy ? from[i] : Vector{};
      asm volatile("" ::: "memory");
    }
  }
  return static_cast<double>(size) * sizeof(Vector) * (kind == Traffic::copy ? 2 : 1);
}

#ifdef KNOWS_BFLOAT16

// vdpbf16ps: two multiply-adds in each of 16 lanes.
__attribute__((target("avx512f,avx512bf16"))) double multiply_dots() {
  constexpr long kSteps = 10'000;
  constexpr int kSums = 24;
  const auto ones = (__m512bh)_mm512_set1_epi32(0x3f803f80);
  __m512 sums[kSums]; // all different, or they would become one
  for (int i = 0; i < kSums; ++i)
    sums[i] = __m512{} + static_cast<float>(i);
  for (long step = 0; step < kSteps; ++step) {
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i)
      sums[i] = _mm512_dpbf16_ps(sums[i], ones, ones);
  }
  for (int i = 1; i < kSums; ++i)
    sums[0] = sums[0] + sums[i];
  g_used.store(sums[0][0], std::memory_order_relaxed);
  return 2.0 * 32 * kSteps * kSums;
}

#define WITH_TILES __attribute__((target("amx-tile,amx-bf16")))

constexpr int64_t kTileBytes = 1024, kTileStride = 64;
constexpr double kTileOperations = 2.0 * 16 * 16 * 32;

struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};
};

WITH_TILES void configure_tiles() {
  TileConfiguration configuration;
  for (int tile = 0; tile < 8; ++tile) {
    configuration.column_bytes[tile] = kTileStride;
    configuration.rows[tile] = 16;
  }
  // All 64 bytes are the operand: GCC 12's own function names 8, and the others might never be written.
  asm volatile("ldtilecfg %0" ::"m"(configuration));
}

// Two by two tiles of sums, as in a product; one step multiplies two tiles of A (4, 5) with two of B (6, 7).
#define MULTIPLY_TILES()   \
  _tile_dpbf16ps(0, 4, 6); \
  _tile_dpbf16ps(1, 4, 7); \
  _tile_dpbf16ps(2, 5, 6); \
  _tile_dpbf16ps(3, 5, 7)

WITH_TILES void load_tiles(const char* from) {
  _tile_loadd(4, from, kTileStride);
  _tile_loadd(5, from + kTileBytes, kTileStride);
  _tile_loadd(6, from + 2 * kTileBytes, kTileStride);
  _tile_loadd(7, from + 3 * kTileBytes, kTileStride);
}

// `from` the registers where bytes are 0, else all of the bytes, of which each step loads four tiles.
WITH_TILES double multiply_tiles(const std::vector<Vector>& numbers, int64_t bytes) {
  constexpr int kSteps = 4096;
  const char* memory = reinterpret_cast<const char*>(numbers.data());
  configure_tiles();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  load_tiles(memory);
  for (int64_t step = 0, at = 0; step < kSteps; ++step) {
    if (bytes != 0) {
      load_tiles(memory + at);
      at = at + 4 * kTileBytes < bytes ? at + 4 * kTileBytes : 0;
    }
    MULTIPLY_TILES();
  }
  alignas(64) float sums[kTileBytes / sizeof(float)];
  _tile_stored(0, sums, kTileStride);
  g_used.store(sums[0], std::memory_order_relaxed);
  _tile_release();
  return 4 * kTileOperations * kSteps;
}

bool may_use_tiles() {
  constexpr unsigned kBfloat16 = 1u << 22, kTiles = 1u << 24; // of leaf 7
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBfloat16) == 0 || (d & kTiles) == 0)
    return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18; // of asm/prctl.h, which may be older
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

#endif

} // namespace

extern "C" {

double multiply_adds(int threads, double seconds) {
  return rate(threads, seconds, [] { return multiply_add; });
}

// kind: 0 reads, 1 writes, 2 copies, which counts both ways. `bytes` each way are shared out among the threads.
double memory(int threads, double seconds, int kind, int64_t bytes) {
  const auto traffic = static_cast<Traffic>(kind);
  const int64_t own = bytes / threads;
  return rate(threads, seconds, [=] {
    return [traffic, from = written(traffic == Traffic::write ? 0 : own),
            to = written(traffic == Traffic::read ? 0 : own)]() mutable { return pass(traffic, from, to); };
  });
}

// Whether the processor has tiles of bfloat16, and the system lets this process use them.
int has_tiles() {
#ifdef KNOWS_BFLOAT16
  return may_use_tiles();
#else
  return 0;
#endif
}

// Whether it has the instruction vdpbf16ps.
int has_dots() {
#ifdef KNOWS_BFLOAT16
  return __builtin_cpu_supports("avx512bf16") != 0;
#else
  return 0;
#endif
}

double dots(int threads, double seconds) {
#ifdef KNOWS_BFLOAT16
  return rate(threads, seconds, [] { return multiply_dots; });
#else
  return 0 * (threads + seconds);
#endif
}

// Tiles are loaded from so many bytes, or stay in registers (0).
double tiles(int threads, double seconds, int64_t bytes) {
#ifdef KNOWS_BFLOAT16
  return rate(threads, seconds, [=] {
    return [bytes, numbers = written(bytes == 0 ? 4 * kTileBytes : bytes)] { return multiply_tiles(numbers, bytes); };
  });
#else
  return 0 * (threads + seconds + bytes);
#endif
}
}
