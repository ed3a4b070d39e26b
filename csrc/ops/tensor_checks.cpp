#include "ops/tensor_checks.h"

#include "common/dtypes.h"
#include "common/errors.h"

namespace edl {

void check_dimensions(
    std::string_view op, const at::Tensor& tensor, const char* name, int64_t count, const char* shape) {
  EDL_ENSURE(
      tensor.dim() == count, op, ": ", name, " must have the shape ", shape, " (got ", tensor.dim(), " dimensions)");
}

void check_storage_type(std::string_view op, const at::Tensor& tensor, const char* name) {
  EDL_ENSURE(
      is_storage_type(tensor.scalar_type()), op, ": ", name, " must be float32, float64, bfloat16 or float16 (got ",
      tensor.scalar_type(), ")");
}

void check_device(
    std::string_view op, const at::Tensor& tensor, const char* name, const at::Tensor& other, const char* other_name) {
  EDL_ENSURE(
      tensor.device() == other.device(), op, ": ", name, " must be on the device of ", other_name, " (got ",
      tensor.device(), " and ", other.device(), ")");
}

void check_form(
    std::string_view op, const at::Tensor& tensor, const char* name, at::ScalarType type, c10::SymIntArrayRef sizes) {
  c10::SymBool fits = tensor.scalar_type() == type && tensor.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; i < sizes.size() && tensor.dim() == static_cast<int64_t>(sizes.size()); ++i) {
    fits = fits & tensor.sym_size(static_cast<int64_t>(i)).sym_eq(sizes[i]);
  }
  EDL_ENSURE(
      fits, op, ": ", name, " must be ", type, " of the shape ", sizes, " (got ", tensor.scalar_type(), " of ",
      tensor.sym_sizes(), ")");
}

} // namespace edl
