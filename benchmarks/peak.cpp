// The machine's peak in float32: multiply-adds on registers alone. `peak THREADS` prints GFLOP/s, the best of five
// seconds.

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kAccumulators = 24;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kAccumulators = 12;
#else
constexpr int kVectorBytes = 16, kAccumulators = 12;
#endif

typedef float Vector __attribute__((vector_size(kVectorBytes)));
using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;

constexpr long kSteps = 500'000; // short enough to find a moment without neighbours on the processor

// Every accumulator is a chain of its own, so that the latency of one hides behind the others.
static float multiply_add(float factor) {
  Vector sums[kAccumulators];
  for (int i = 0; i < kAccumulators; ++i)
    sums[i] = Vector{} + static_cast<float>(i);
  const Vector factors = Vector{} + factor, addends = Vector{} + 0.5f;
  for (long step = 0; step < kSteps; ++step) {
#pragma GCC unroll 32
    for (int i = 0; i < kAccumulators; ++i)
      sums[i] = sums[i] * factors + addends;
  }
  float total = 0;
  for (const Vector& sum : sums)
    total += sum[0];
  return total;
}

static double seconds_of(std::vector<float>& results) {
  std::vector<std::thread> team;
  const auto start = Clock::now();
  for (float& result : results)
    team.emplace_back([&result] { result = multiply_add(result); });
  for (std::thread& thread : team)
    thread.join();
  return Seconds(Clock::now() - start).count();
}

int main(int count, char** arguments) {
  const int threads = count > 1 ? std::atoi(arguments[1]) : 1;
  const double operations = 2.0 * kSteps * kAccumulators * (kVectorBytes / sizeof(float)) * threads;
  double best = 0;
  volatile float used = 0; // the results, so that no compiler leaves their computation out
  for (const auto start = Clock::now(); Seconds(Clock::now() - start).count() < 5;) {
    std::vector<float> results(threads, 0.5f);
    const double speed = operations / seconds_of(results);
    for (float result : results)
      used = used + result;
    if (speed > best)
      best = speed;
  }
  std::printf("%.1f\n", best * 1e-9);
}
