#pragma once

#include <c10/core/SymBool.h>
#include <c10/util/Exception.h>

namespace edl {

// A condition over sizes may be symbolic (torch.compile, torch.export): then it becomes a guard or a run-time
// assertion.
inline bool holds(bool condition) {
  return condition;
}
inline bool holds(const c10::SymBool& condition) {
  return condition.expect_true(__FILE__, __LINE__);
}

} // namespace edl

// One sentence: the op, the rule, and what was got. ValueError in Python.
#define EDL_ENSURE(condition, ...) TORCH_CHECK_VALUE(::edl::holds(condition), __VA_ARGS__)

// The same for an id outside its range. IndexError in Python.
#define EDL_ENSURE_INDEX(condition, ...) TORCH_CHECK_INDEX(condition, __VA_ARGS__)
