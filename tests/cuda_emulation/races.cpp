#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "execution.h"
#include "memory.h"

namespace edl_emulation {
namespace {

enum class Kind { read, write, atomic };

struct Access {
  uint32_t block; // 0: none
  uint32_t thread;
  uint32_t block_epoch;
  uint32_t warp_epoch;
  bool operator==(const Access&) const = default;
};

// What is known of one byte. More than three readers that nothing orders are alike for what comes after.
struct Byte {
  Access write;
  bool write_is_atomic;
  Access reads[3];
};

struct Free {
  void operator()(void* memory) const {
    std::free(memory);
  }
};

struct Memory {
  const char* name;
  Bytes bytes;
  bool is_shared; // every block has its own
  Contents contents;
  uint32_t defined_since; // a byte written by an earlier block is not defined any more
  std::unique_ptr<Byte[], Free> known; // made at the first access
  std::vector<bool> is_split; // of each word: until one of its bytes is accessed alone, the first stands for all
};

constexpr size_t kWord = 4;

std::vector<Memory> memories; // by address
bool called_by_compiler = false;

auto first_beyond(const char* address) {
  return std::upper_bound(memories.begin(), memories.end(), address, [](const char* before, const Memory& memory) {
    return before < memory.bytes.begin;
  });
}

Memory* find(const char* address) {
  const auto beyond = first_beyond(address);
  return beyond != memories.begin() && beyond[-1].bytes.holds(address) ? &beyond[-1] : nullptr;
}

void add_static_shared_memory() {
  static bool done = false;
  if (!done) {
    done = true;
    const Bytes shared = static_shared_memory();
    add_memory("static shared memory", shared.begin, shared.end - shared.begin, true);
  }
}

bool same_thread(const Access& a, const Access& b) {
  return a.block == b.block && a.thread == b.thread;
}

bool is_before(const Memory& memory, const Access& a, const Access& b) {
  return a.block < (memory.is_shared ? b.block : first_block_of_launch) || same_thread(a, b) ||
      (a.block == b.block &&
       (a.block_epoch < b.block_epoch || (a.thread / 32 == b.thread / 32 && a.warp_epoch < b.warp_epoch)));
}

std::string who(const Access& access) {
  return "thread " + std::to_string(access.thread) + " of block " +
      std::to_string(access.block - first_block_of_launch);
}

[[noreturn]] void report(const Memory& memory, const char* address, const std::string& what) {
  fail("byte " + std::to_string(address - memory.bytes.begin) + " of " + memory.name + ": " + what);
}

void check_order(const Memory& memory, const char* address, const char* what, const Access& a, const Access& b) {
  if (!is_before(memory, a, b)) {
    report(memory, address, "a race: " + who(a) + what + who(b));
  }
}

void note_read(Byte& byte, const Access& now) {
  Access* place = &byte.reads[2];
  for (Access& read : byte.reads) {
    if (same_thread(read, now) || read.block < first_block_of_launch ||
        (read.block == now.block && read.block_epoch < now.block_epoch)) {
      place = &read;
      break;
    }
  }
  *place = now;
}

void check_defined(
    const Memory& memory, const Byte& byte, const char* address, const Access& now, uint32_t defined_since) {
  if (byte.write.block < defined_since) {
    report(memory, address, who(now) + " reads what was not written");
  }
}

// Whether the thread accessed this last, in the same way and without a barrier since.
bool is_repeated(const Byte& byte, const Access& now, Kind kind) {
  if (kind == Kind::read) {
    return byte.reads[0] == now;
  }
  return kind == Kind::write && byte.write == now && !byte.write_is_atomic && byte.reads[0].block == 0;
}

void read_byte(const Memory& memory, Byte& byte, const char* address, const Access& now) {
  check_order(memory, address, " writes and, without a barrier, it is read by ", byte.write, now);
  note_read(byte, now);
}

void write_byte(const Memory& memory, Byte& byte, const char* address, const Access& now, bool atomic) {
  if (!(atomic && byte.write_is_atomic)) {
    check_order(memory, address, " writes and, without a barrier, it is written by ", byte.write, now);
  }
  for (Access& read : byte.reads) {
    check_order(memory, address, " reads and, without a barrier, it is written by ", read, now);
    read = {};
  }
  byte.write = now;
  byte.write_is_atomic = atomic;
}

void check_byte(Memory& memory, Byte& byte, const char* address, const Access& now, Kind kind) {
  if (is_repeated(byte, now, kind)) {
    return;
  }
  if (kind != Kind::write) {
    check_defined(memory, byte, address, now, memory.is_shared ? now.block : memory.defined_since);
  }
  if (kind == Kind::read) {
    read_byte(memory, byte, address, now);
  } else {
    write_byte(memory, byte, address, now, kind == Kind::atomic);
  }
}

void split_word(Memory& memory, size_t word) {
  if (!memory.is_split[word]) {
    memory.is_split[word] = true;
    Byte* bytes = &memory.known[word * kWord];
    std::fill_n(bytes + 1, kWord - 1, *bytes);
  }
}

void check(const void* data, size_t bytes, Kind kind) {
  if (moment.block == 0 || !called_by_compiler) {
    return; // the host; or an atomic among accesses that are not seen
  }
  const char* address = static_cast<const char*>(data);
  if (all_stacks().holds(address)) {
    if (!own_stack().holds(address)) {
      fail("thread " + std::to_string(moment.thread) + " uses the local memory of another thread");
    }
    return;
  }
  add_static_shared_memory();
  Memory* memory = find(address);
  if (memory == nullptr) {
    return; // constants and arguments; what is outside of all memory is the address sanitizer's
  }
  const size_t size = memory->bytes.end - memory->bytes.begin;
  if (memory->known == nullptr) {
    const size_t words = (size + kWord - 1) / kWord;
    memory->known.reset(static_cast<Byte*>(std::calloc(words * kWord, sizeof(Byte))));
    memory->is_split.resize(words);
  }
  if (kind != Kind::read && memory->contents == Contents::input) {
    report(*memory, address, "an input is written");
  }
  const Access now = {moment.block, moment.thread, moment.block_epoch, moment.warp_epoch};
  size_t at = address - memory->bytes.begin;
  const size_t end = std::min(at + bytes, size);
  while (at < end) {
    const size_t word = at / kWord;
    const bool is_whole = at % kWord == 0 && end - at >= kWord && !memory->is_split[word];
    if (!is_whole) {
      split_word(*memory, word);
    }
    check_byte(*memory, memory->known[at], memory->bytes.begin + at, now, kind);
    at += is_whole ? kWord : 1;
  }
}

} // namespace

void add_memory(const char* name, const void* data, size_t bytes, bool is_shared) {
  const char* begin = static_cast<const char*>(data);
  memories.insert(first_beyond(begin), {name, {begin, begin + bytes}, is_shared, Contents::defined, 0, nullptr, {}});
}

void set_contents(const void* data, Contents contents) {
  for (Memory& memory : memories) {
    if (memory.bytes.begin == data) {
      memory.contents = contents;
      memory.defined_since = contents == Contents::undefined ? first_block_of_launch : 0;
    }
  }
}

void remove_memory(const void* data) {
  std::erase_if(memories, [&](const Memory& memory) { return memory.bytes.begin == data; });
}

bool accesses_are_checked() {
  return called_by_compiler;
}

} // namespace edl_emulation

// ---- what the compiler calls before every access ----

using edl_emulation::check;
using edl_emulation::Kind;

extern "C" {
#define EDL_ACCESS(bytes)                             \
  void __tsan_read##bytes(void* address) {            \
    check(address, bytes, Kind::read);                \
  }                                                   \
  void __tsan_write##bytes(void* address) {           \
    check(address, bytes, Kind::write);               \
  }                                                   \
  void __tsan_unaligned_read##bytes(void* address) {  \
    check(address, bytes, Kind::read);                \
  }                                                   \
  void __tsan_unaligned_write##bytes(void* address) { \
    check(address, bytes, Kind::write);               \
  }
EDL_ACCESS(1)
EDL_ACCESS(2)
EDL_ACCESS(4)
EDL_ACCESS(8)
EDL_ACCESS(16)
#undef EDL_ACCESS

void __tsan_read_range(void* address, unsigned long bytes) {
  check(address, bytes, Kind::read);
}
void __tsan_write_range(void* address, unsigned long bytes) {
  check(address, bytes, Kind::write);
}
void __tsan_atomic_add(void* address, int bytes) {
  check(address, static_cast<size_t>(bytes), Kind::atomic);
}
void __tsan_init() {
  edl_emulation::called_by_compiler = true;
}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
