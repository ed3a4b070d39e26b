#pragma once

#include <c10/util/Exception.h>

#include <string_view>

#include "common/score_function.h"

namespace edl {

inline Scores parse_scores(std::string_view op, std::string_view name) {
  if (name == "softmax") {
    return Scores::softmax;
  }
  if (name == "sigmoid") {
    return Scores::sigmoid;
  }
  TORCH_CHECK_VALUE(name == "none", op, ": scores must be 'softmax', 'sigmoid' or 'none' (got '", name, "')");
  return Scores::none;
}

} // namespace edl
