#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace edl {

// Asks for huge pages behind a large new tensor. The allocator hands large blocks back to the system, so that the next
// one is written page by page for the first time again: 4 KiB at a time that takes longer than the multiplications of a
// small expert.
inline at::Tensor on_huge_pages(at::Tensor fresh) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 2 << 20;
  const auto begin = (reinterpret_cast<uintptr_t>(fresh.mutable_data_ptr()) + page - 1) / page * page;
  const auto end = (reinterpret_cast<uintptr_t>(fresh.mutable_data_ptr()) + fresh.nbytes()) / page * page;
  if (begin < end) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE); // a wish: refused, nothing is lost
  }
#endif
  return fresh;
}

} // namespace edl
