#pragma once

// What every C++ test takes: the public header of edl, tensors, Catch2, and a few words.
#include <edl/edl.h>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/variable.h>

#include <string>
#include <utility>
#include <vector>

#include "catch.h"

namespace edl_tests {

inline at::Tensor doubles(std::vector<double> values, at::IntArrayRef shape) {
  return at::tensor(values, at::kDouble).reshape(shape);
}

inline at::Tensor ids(std::vector<int64_t> values) {
  return at::tensor(values, at::kLong);
}

inline at::Tensor with_gradient(const at::Tensor& tensor) {
  return tensor.detach().clone().requires_grad_(true);
}

// Largest difference of two tensors of one shape.
inline double distance(const at::Tensor& a, const at::Tensor& b) {
  CATCH_REQUIRE(a.sizes() == b.sizes());
  return a.numel() == 0 ? 0 : (a.to(at::kDouble) - b.to(at::kDouble)).abs().max().item<double>();
}

// The gradient of sum(weights * function(input)) by central differences.
template <typename Function>
at::Tensor numeric_gradient(const at::Tensor& input, const at::Tensor& weights, Function function) {
  constexpr double kStep = 1e-6;
  at::Tensor gradient = at::zeros_like(input);
  for (int64_t i = 0; i < input.numel(); ++i) {
    at::Tensor step = at::zeros_like(input);
    step.view(-1)[i] = kStep;
    gradient.view(-1)[i] = ((function(input + step) - function(input - step)) * weights).sum() / (2 * kStep);
  }
  return gradient;
}

// The gradient of sum(weights * function(input)) by autograd.
template <typename Function>
at::Tensor gradient(const at::Tensor& input, const at::Tensor& weights, Function function) {
  const at::Tensor leaf = with_gradient(input);
  return torch::autograd::grad({(function(leaf) * weights).sum()}, {leaf})[0];
}

// The sentence that a call fails with; "no error" where it does not.
template <typename Error = c10::ValueError, typename Call>
std::string error_of(Call&& call) {
  try {
    std::forward<Call>(call)();
  } catch (const Error& error) {
    return error.what_without_backtrace();
  } catch (const std::exception& error) {
    return std::string("an error of another type: ") + error.what();
  }
  return "no error";
}

} // namespace edl_tests
