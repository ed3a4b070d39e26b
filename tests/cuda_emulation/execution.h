#pragma once

// Between the execution of threads (emulation.cpp) and the watch over their memory (races.cpp).

#include <cstddef>
#include <cstdint>
#include <string>

namespace edl_emulation {

// When the running thread does something. Blocks are numbered through all launches, from 1; 0 is the host.
struct Moment {
  uint32_t block;
  uint32_t thread;
  uint32_t block_epoch; // barriers of the block so far
  uint32_t warp_epoch; //  __syncwarp of the warp so far
};
extern Moment moment;
extern uint32_t first_block_of_launch;

// The local memory of all threads, and of the running one.
struct Bytes {
  const char* begin;
  const char* end;
  bool holds(const char* address) const {
    return address >= begin && address < end;
  }
};
Bytes all_stacks();
Bytes own_stack();

Bytes static_shared_memory();

// Ends the launch from inside a thread: it throws the sentence.
[[noreturn]] void fail(const std::string& sentence);

} // namespace edl_emulation
