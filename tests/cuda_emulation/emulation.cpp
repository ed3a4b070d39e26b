// Compiled without sanitizers, which do not know fibers.
#include "emulation.h"

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "execution.h"
#include "memory.h"

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

extern "C" {
extern char edl_shared_memory_begin[]; // shared_memory.ld
extern char edl_shared_memory_end[];
void __asan_unpoison_memory_region(const volatile void*, size_t) __attribute__((weak));
void __tsan_atomic_add(void* address, int bytes);
}

namespace edl_emulation {

Moment moment = {};
uint32_t first_block_of_launch = 1;

namespace {

constexpr int kWarp = 32;
constexpr unsigned kMostThreads = 1024;
constexpr size_t kStackBytes = 128 * 1024;

// ---- fibers ----

// Contexts start a fiber; afterwards the compiler's own jumps switch, which need no system call.
struct Fiber {
  ucontext_t context;
  void* jump[5];
  bool started;
};

struct Thread {
  enum { ready, waiting, finished } state = ready;
  Place place = {}; // where it waits
  uint32_t warp_operations = 0; // so far
};

std::array<Fiber, kMostThreads> fibers;
std::array<Thread, kMostThreads> threads;
char* stacks = nullptr;
void* scheduler[5];
unsigned running = 0; // the thread
const std::function<void()>* body = nullptr;
std::string failure;

char* stack_of(unsigned thread) {
  return stacks + thread * kStackBytes;
}

void allocate_stacks() {
  if (stacks != nullptr) {
    return;
  }
  void* memory = mmap(nullptr, kMostThreads * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    throw std::runtime_error("no memory for the stacks of the threads");
  }
  stacks = static_cast<char*>(memory);
  for (unsigned thread = 0; thread < kMostThreads; ++thread) {
    mprotect(stack_of(thread), static_cast<size_t>(sysconf(_SC_PAGESIZE)), PROT_NONE); // what overflows it, crashes
  }
}

[[gnu::noinline, noreturn]] void jump_to(void** place) {
  __builtin_longjmp(place, 1);
}

// From a thread to the scheduler, which comes back.
[[gnu::noinline]] void pause() {
  if (__builtin_setjmp(fibers[running].jump) == 0) {
    jump_to(scheduler);
  }
}

void run_threads() {
  for (;;) {
    (*body)();
    threads[running].state = Thread::finished;
    pause();
  }
}

void start(Fiber& fiber) {
  getcontext(&fiber.context);
  fiber.context.uc_stack = {stack_of(running), 0, kStackBytes};
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_threads, 0);
  fiber.started = true;
  setcontext(&fiber.context);
}

// Runs thread `running` until it pauses.
[[gnu::noinline]] void resume() {
  if (__builtin_setjmp(scheduler) == 0) {
    Fiber& fiber = fibers[running];
    if (!fiber.started) {
      start(fiber);
    }
    jump_to(fiber.jump);
  }
}

// ---- a block ----

struct Warp {
  unsigned arrived;
  uint64_t values[2][kWarp]; // a lane may be one operation ahead
};

struct Block {
  unsigned size;
  unsigned arrived;
  int predicates; //   of those who arrived
  int result; //       of the last barrier
  uint32_t epoch;
  std::array<uint32_t, kMostThreads / kWarp> warp_epochs;
  std::array<Warp, kMostThreads / kWarp> warps;
};
Block block;

Order order = Order::forward;
std::mt19937_64 generator;
std::vector<unsigned> turns; // threads, the first that is ready runs
std::array<unsigned, kMostThreads> turn_of; // the other way round
std::array<uint64_t, kMostThreads / 64> ready_turns; // a bit each
char* dynamic_memory = nullptr;

std::string describe(const Place& place) {
  const char* name = std::strrchr(place.file, '/');
  return std::string(place.operation) + " of " + (name != nullptr ? name + 1 : place.file) + ":" +
      std::to_string(place.line);
}

bool equal(const char* a, const char* b) {
  return a == b || std::strcmp(a, b) == 0; // mostly one literal, and a sanitizer's strcmp is slow
}

bool same(const Place& a, const Place& b) {
  return a.line == b.line && equal(a.operation, b.operation) && equal(a.file, b.file);
}

void expect_same_place(unsigned first, unsigned count) {
  for (unsigned thread = first + 1; thread < first + count; ++thread) {
    if (!same(threads[first].place, threads[thread].place)) {
      fail(
          "threads " + std::to_string(first) + " and " + std::to_string(thread) +
          " wait at different places: " + describe(threads[first].place) + " and " + describe(threads[thread].place));
    }
  }
}

void release(unsigned first, unsigned count) {
  for (unsigned thread = first; thread < first + count; ++thread) {
    threads[thread].state = Thread::ready;
    ready_turns[turn_of[thread] / 64] |= uint64_t(1) << turn_of[thread] % 64;
  }
}

std::string deadlock() {
  unsigned returned = 0;
  const Place* first = nullptr;
  std::string waiting;
  for (unsigned thread = 0; thread < block.size; ++thread) {
    const Place& place = threads[thread].place;
    if (threads[thread].state == Thread::finished) {
      ++returned;
    } else if (first == nullptr || !same(*first, place)) {
      waiting += "thread " + std::to_string(thread) + " waits for ever at " + describe(place) + ", ";
      first = &place;
    }
  }
  return waiting + std::to_string(returned) + " of " + std::to_string(block.size) + " threads have returned";
}

// ---- a launch ----

std::vector<unsigned> permutation(unsigned count) {
  std::vector<unsigned> numbers(count);
  std::iota(numbers.begin(), numbers.end(), 0u);
  if (order == Order::reversed) {
    std::reverse(numbers.begin(), numbers.end());
  } else if (order == Order::random) {
    std::shuffle(numbers.begin(), numbers.end(), generator);
  }
  return numbers;
}

// The next thread that can run. In random order the search begins anywhere.
bool choose_thread() {
  const size_t words = (turns.size() + 63) / 64;
  const size_t first = order == Order::random ? generator() % words : 0;
  for (size_t i = 0; i < words; ++i) {
    const size_t word = (first + i) % words;
    if (uint64_t& ready = ready_turns[word]; ready != 0) {
      running = turns[word * 64 + static_cast<size_t>(std::countr_zero(ready))];
      ready &= ready - 1;
      return true;
    }
  }
  return false;
}

void abandon_fibers() {
  for (Fiber& fiber : fibers) {
    fiber.started = false;
  }
  if (__asan_unpoison_memory_region != nullptr) {
    __asan_unpoison_memory_region(stacks, kMostThreads * kStackBytes);
  }
}

void run_block() {
  turns = permutation(block.size);
  for (unsigned turn = 0; turn < block.size; ++turn) {
    turn_of[turns[turn]] = turn;
  }
  ready_turns.fill(0);
  block.arrived = 0;
  block.predicates = 0;
  block.epoch = 0;
  block.warp_epochs.fill(0);
  for (Warp& warp : block.warps) {
    warp.arrived = 0;
  }
  std::fill_n(threads.begin(), block.size, Thread{});
  release(0, block.size);
  unsigned finished = 0;
  while (finished < block.size) {
    if (!choose_thread()) {
      failure = deadlock();
      break;
    }
    threadIdx.x = running;
    moment.thread = running;
    moment.block_epoch = block.epoch;
    moment.warp_epoch = block.warp_epochs[running / kWarp];
    resume();
    if (!failure.empty()) {
      break;
    }
    finished += threads[running].state == Thread::finished;
  }
}

void check_configuration(dim3 grid, dim3 size, size_t shared_bytes) {
  const bool right = grid.x >= 1 && grid.x < 0x80000000u && grid.y >= 1 && grid.y <= 65535 && grid.z >= 1 &&
      grid.z <= 65535 && size.x >= 1 && size.x <= kMostThreads && size.y == 1 && size.z == 1 &&
      shared_bytes <= 48 * 1024;
  if (!right || size.x % kWarp != 0) {
    throw std::runtime_error(
        "a launch of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " + std::to_string(grid.z) +
        " blocks of " + std::to_string(size.x) + " threads with " + std::to_string(shared_bytes) +
        " bytes of shared memory");
  }
}

} // namespace

Bytes all_stacks() {
  return {stacks, stacks + kMostThreads * kStackBytes};
}
Bytes own_stack() {
  return {stack_of(running), stack_of(running) + kStackBytes};
}
Bytes static_shared_memory() {
  return {edl_shared_memory_begin, edl_shared_memory_end};
}

void fail(const std::string& sentence) {
  failure = sentence;
  jump_to(scheduler);
}

void set_order(Order new_order, uint64_t seed) {
  order = new_order;
  generator.seed(seed);
}

void poison(void* data, size_t bytes, uint64_t seed) {
  auto* out = static_cast<unsigned char*>(data);
  const size_t whole = bytes / sizeof(uint64_t);
  for (size_t i = 0; i < whole; ++i) {
    const uint64_t word = (seed + i + 1) * 0x9e3779b97f4a7c15u;
    std::memcpy(out + i * sizeof(word), &word, sizeof(word));
  }
  for (size_t i = whole * sizeof(uint64_t); i < bytes; ++i) {
    out[i] = static_cast<unsigned char>((seed + i + 1) * 0x9d);
  }
}

void launch(const char* kernel, dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& thread) {
  check_configuration(grid, size, shared_bytes);
  allocate_stacks();
  const std::unique_ptr<char[]> own_shared(new char[shared_bytes]);
  dynamic_memory = own_shared.get();
  if (shared_bytes > 0) {
    add_memory("dynamic shared memory", dynamic_memory, shared_bytes, true);
  }
  body = &thread;
  failure.clear();
  gridDim = grid;
  blockDim = size;
  block.size = size.x;
  const uint32_t blocks = grid.x * grid.y * grid.z;
  const uint32_t begin = first_block_of_launch;
  uint32_t number = begin;
  const Bytes shared_memory = static_shared_memory();
  for (const unsigned index : permutation(blocks)) {
    blockIdx = {index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y};
    moment.block = number++;
    poison(const_cast<char*>(shared_memory.begin), shared_memory.end - shared_memory.begin, generator());
    poison(dynamic_memory, shared_bytes, generator());
    run_block();
    if (!failure.empty()) {
      break;
    }
  }
  moment = {};
  first_block_of_launch = number;
  if (shared_bytes > 0) {
    remove_memory(dynamic_memory);
  }
  if (!failure.empty()) {
    abandon_fibers();
    throw std::runtime_error(std::string(kernel) + ": " + failure);
  }
}

void* dynamic_shared() {
  return dynamic_memory;
}

int wait_for_block(Place place, Combine combine, bool predicate) {
  threads[running].state = Thread::waiting;
  threads[running].place = place;
  block.predicates += predicate;
  if (++block.arrived == block.size) {
    expect_same_place(0, block.size);
    block.result = block.predicates;
    block.arrived = 0;
    block.predicates = 0;
    ++block.epoch;
    release(0, block.size);
  }
  pause();
  return combine == Combine::any ? block.result != 0 : block.result;
}

const uint64_t* exchange(Place place, unsigned mask, uint64_t value, bool orders_memory) {
  if (mask != 0xffffffffu) {
    fail(describe(place) + ": only operations of a whole warp are emulated");
  }
  const unsigned first = running / kWarp * kWarp;
  Warp& warp = block.warps[running / kWarp];
  Thread& thread = threads[running];
  uint64_t* values = warp.values[thread.warp_operations++ % 2];
  values[running % kWarp] = value;
  thread.state = Thread::waiting;
  thread.place = place;
  if (++warp.arrived == kWarp) {
    expect_same_place(first, kWarp);
    warp.arrived = 0;
    block.warp_epochs[running / kWarp] += orders_memory;
    release(first, kWarp);
  }
  pause();
  return values;
}

} // namespace edl_emulation

int atomicAdd(int* address, int value) {
  __tsan_atomic_add(address, sizeof(int));
  const int before = *address;
  *address = before + value;
  return before;
}
