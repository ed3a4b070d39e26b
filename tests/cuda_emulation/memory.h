#pragma once

// The memory that kernels are given. Built with -fsanitize=thread, for the calls that it puts before every access and
// without its library, each access of a kernel is checked:
// - two threads must not touch one byte, at least one of them writing and not both by atomics, unless a barrier of the
//   block or a __syncwarp of the warp stands between them. Shuffles and votes order no memory, nor do blocks.
// - what nobody wrote must not be read, in shared memory since the block began;
// - inputs must not be written.

#include <cstddef>

namespace edl_emulation {

enum class Contents { input, defined, undefined };

// Shared memory every block has for itself: written by nobody when it begins.
void add_memory(const char* name, const void* data, size_t bytes, bool is_shared = false);
void set_contents(const void* data, Contents contents);
void remove_memory(const void* data);

// Whether this program is built with the calls.
bool accesses_are_checked();

} // namespace edl_emulation
