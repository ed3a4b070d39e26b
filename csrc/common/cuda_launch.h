#pragma once

// Every kernel is launched, and names its dynamic shared memory, through these macros alone. An emulation on the host,
// which compiles the same sources without nvcc, defines them before this file is read.

#if !defined(EDL_LAUNCH)

#include <cuda_runtime.h>

// A kernel with several template arguments is passed in parentheses.
#define EDL_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__)

#define EDL_DYNAMIC_SHARED(Type, name)                        \
  extern __shared__ __align__(16) unsigned char name##_raw[]; \
  Type* const name = reinterpret_cast<Type*>(name##_raw)

#endif
