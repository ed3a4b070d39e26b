#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>

// Rules for a single tensor, each one line of a contract. `name` is what the operator calls it.
namespace edl {

// As many dimensions as `shape` shows, such as "[T, E]".
void check_dimensions(
    std::string_view op, const at::Tensor& tensor, const char* name, int64_t count, const char* shape);

void check_storage_type(std::string_view op, const at::Tensor& tensor, const char* name);

void check_device(
    std::string_view op, const at::Tensor& tensor, const char* name, const at::Tensor& other, const char* other_name);

// What a backward operator is handed: this type and these sizes.
void check_form(
    std::string_view op, const at::Tensor& tensor, const char* name, at::ScalarType type, c10::SymIntArrayRef sizes);

} // namespace edl
