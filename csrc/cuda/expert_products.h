#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace edl::cuda {

// Matrix products of the rows of each expert, rows offsets[e] .. offsets[e + 1] belonging to expert e.
//
// Grouped: one `at::_grouped_mm` for all experts, without waiting for the device; bfloat16 on compute capability 9 and
// 10, rows of a multiple of 16 bytes, fewer than 1024 experts. Elsewhere the offsets are read on the host and each
// expert is one `at::mm`, of which a warning tells once; a CUDA graph cannot capture that, and it raises.
class ExpertProducts {
 public:
  ExpertProducts(
      const char* op,
      const at::Tensor& offsets, //  [E + 1] int32, dense
      const at::Tensor& gate_up, //  [E, 2I, H]
      const at::Tensor& down); //    [E, H, I]

  // gate_up or down as the products take it.
  at::Tensor dense(const at::Tensor& parameter) const;

  // result[i] = rows[i] matrices[e], [N, B]. Rows without an expert are left as they are in memory.
  at::Tensor by_row(
      const at::Tensor& rows, //       [N, A]
      const at::Tensor& matrices) const; // [E, A, B]

  // result[e] = left[rows of e]^T right[rows of e], [E, A, B]; exact zeros for an expert without rows.
  at::Tensor by_expert(
      const at::Tensor& left, //    [N, A]
      const at::Tensor& right) const; // [N, B]

 private:
  int64_t num_experts() const {
    return offsets_.size(0) - 1;
  }

  const char* op_;
  at::Tensor offsets_;
  bool grouped_;
  std::vector<int64_t> bounds_; // [E + 1], on the host; empty where grouped
};

} // namespace edl::cuda
