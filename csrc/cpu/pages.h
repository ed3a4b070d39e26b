#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace edl::cpu {

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

// Whether the system has yet to hand out the pages behind a tensor. It clears them when they are first written, which
// leaves them in the caches.
inline bool is_on_fresh_pages(const at::Tensor& tensor) {
#if defined(__linux__)
  constexpr uintptr_t page = 4096;
  const auto middle = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) + tensor.nbytes() / 2;
  unsigned char is_resident = 0;
  // A page size above 4 KiB makes this fail: then the pages count as used.
  return mincore(reinterpret_cast<void*>(middle / page * page), 1, &is_resident) == 0 && (is_resident & 1) == 0;
#else
  return false;
#endif
}

} // namespace edl::cpu
