#pragma once

// What a .cu file needs to be compiled by the host's compiler and run on the host: read before everything else.
//
// The blocks of a launch run one after another, the threads of a block as fibers that take turns. A thread runs until
// it waits at a barrier or a warp's operation; in which order threads run in between, and blocks, the test chooses.
// Threads that wait at different places, or for one that has returned, make the launch throw a sentence.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <math.h> // for its names outside of std

#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

// A kernel is what it is for the oldest device that it is compiled for.
#define __CUDA_ARCH__ 800

#undef __shared__
#define __shared__ static // and shared_memory.ld puts all of it in one place
#undef __launch_bounds__
#define __launch_bounds__(...)

#define EDL_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (static_cast<void>(stream), ::edl_emulation::launch(#kernel, grid, block, shared_bytes, [&] { kernel(__VA_ARGS__); }))
#define EDL_DYNAMIC_SHARED(Type, name) Type* const name = static_cast<Type*>(::edl_emulation::dynamic_shared())

extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

namespace edl_emulation {

// ---- for tests ----

enum class Order { forward, reversed, random };

// How blocks and threads take turns from now on, and what fills shared memory before a block runs.
void set_order(Order order, uint64_t seed);

// Fills memory with bytes that mean nothing and depend on the seed.
void poison(void* data, size_t bytes, uint64_t seed);

// ---- for kernels ----

void launch(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);
void* dynamic_shared();

// Where a thread waits. Each line of the source counts as a place.
struct Place {
  const char* file;
  int line;
  const char* operation;
};

enum class Combine { none, count, any };
int wait_for_block(Place place, Combine combine, bool predicate);

// What a lane brings to an operation of its warp, and what all 32 lanes brought. Only __syncwarp orders memory.
const uint64_t* exchange(Place place, unsigned mask, uint64_t value, bool orders_memory = false);

inline unsigned lane() {
  return threadIdx.x % 32;
}

template <typename Value>
Value exchange_with(Place place, unsigned mask, Value value, unsigned source) {
  static_assert(std::is_trivially_copyable_v<Value> && sizeof(Value) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(value));
  const uint64_t found = exchange(place, mask, bits)[source];
  std::memcpy(&value, &found, sizeof(value));
  return value;
}

} // namespace edl_emulation

#define EDL_PLACE(operation) \
  ::edl_emulation::Place {   \
    file, line, operation    \
  }
#define EDL_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(EDL_CALLER) {
  edl_emulation::wait_for_block(EDL_PLACE("__syncthreads"), edl_emulation::Combine::none, false);
}
inline int __syncthreads_or(int predicate, EDL_CALLER) {
  return edl_emulation::wait_for_block(EDL_PLACE("__syncthreads_or"), edl_emulation::Combine::any, predicate != 0);
}
inline int __syncthreads_count(int predicate, EDL_CALLER) {
  return edl_emulation::wait_for_block(EDL_PLACE("__syncthreads_count"), edl_emulation::Combine::count, predicate != 0);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, EDL_CALLER) {
  edl_emulation::exchange(EDL_PLACE("__syncwarp"), mask, 0, true);
}
template <typename Value>
Value __shfl_sync(unsigned mask, Value value, int source, EDL_CALLER) {
  return edl_emulation::exchange_with(EDL_PLACE("__shfl_sync"), mask, value, static_cast<unsigned>(source) % 32);
}
template <typename Value>
Value __shfl_xor_sync(unsigned mask, Value value, int other, EDL_CALLER) {
  const unsigned source = edl_emulation::lane() ^ static_cast<unsigned>(other);
  return edl_emulation::exchange_with(EDL_PLACE("__shfl_xor_sync"), mask, value, source % 32);
}
template <typename Value>
Value __shfl_up_sync(unsigned mask, Value value, unsigned delta, EDL_CALLER) {
  const unsigned lane = edl_emulation::lane();
  return edl_emulation::exchange_with(EDL_PLACE("__shfl_up_sync"), mask, value, lane < delta ? lane : lane - delta);
}
inline int __reduce_max_sync(unsigned mask, int value, EDL_CALLER) {
  const uint64_t* values = edl_emulation::exchange(EDL_PLACE("__reduce_max_sync"), mask, static_cast<unsigned>(value));
  int highest = value;
  for (int lane = 0; lane < 32; ++lane) {
    const int other = static_cast<int>(static_cast<unsigned>(values[lane]));
    highest = other > highest ? other : highest;
  }
  return highest;
}
inline unsigned __match_any_sync(unsigned mask, int value, EDL_CALLER) {
  const uint64_t* values = edl_emulation::exchange(EDL_PLACE("__match_any_sync"), mask, static_cast<unsigned>(value));
  unsigned equal = 0;
  for (int lane = 0; lane < 32; ++lane) {
    equal |= values[lane] == static_cast<unsigned>(value) ? 1u << lane : 0u;
  }
  return equal;
}
inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}
int atomicAdd(int* address, int value); // in emulation.cpp: an access that never races

#undef EDL_CALLER
#undef EDL_PLACE
