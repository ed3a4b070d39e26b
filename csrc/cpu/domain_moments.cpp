// domain_moments on the CPU: segment_sums [L, S, E] and counts [L, S] → sums, squares [L, D, E] and counts [L, D], in
// float64. One task per layer and block of columns walks the segments in order, so the result does not depend on the
// number of threads. Segments without tokens or weight are skipped unread. Cost: one read of segment_sums.
#include "ops/domain_moments.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/errors.h"
#include "common/tensors.h"
#include "cpu/indices.h"

namespace edl::cpu {
namespace {

constexpr int64_t kColumns = 64;
constexpr int64_t kGrainElements = 1 << 14; // work below this is not worth waking a thread

// The labels as a list of (domain, weight) per segment: one entry for an id, up to D for soft labels.
struct Membership {
  struct Entry {
    int64_t domain;
    double weight;
  };
  std::vector<int64_t> first; // [S + 1]
  std::vector<Entry> entries;
};

Membership members_by_id(std::string_view op, const at::Tensor& labels, int64_t num_domains) {
  const at::Tensor dense = labels.contiguous();
  const Indices ids(dense);
  Membership members;
  members.first.push_back(0);
  for (int64_t s = 0; s < dense.size(0); ++s) {
    EDL_ENSURE_INDEX(
        ids[s] >= -1 && ids[s] < num_domains, op, ": labels must be at least -1 and below num_domains = ", num_domains,
        " (got ", ids[s], " for segment ", s, ")");
    if (ids[s] >= 0) {
      members.entries.push_back({ids[s], 1.0});
    }
    members.first.push_back(static_cast<int64_t>(members.entries.size()));
  }
  return members;
}

Membership members_by_weight(std::string_view op, const at::Tensor& labels, int64_t num_domains) {
  const at::Tensor dense = labels.to(at::kDouble).contiguous();
  const double* weights = dense.const_data_ptr<double>();
  Membership members;
  members.first.push_back(0);
  for (int64_t s = 0; s < dense.size(0); ++s) {
    for (int64_t d = 0; d < num_domains; ++d) {
      const double weight = weights[s * num_domains + d];
      EDL_ENSURE(
          weight >= 0 && std::isfinite(weight), op, ": labels as weights must be finite and at least 0 (got ", weight,
          " for segment ", s, " and domain ", d, ")");
      if (weight != 0) {
        members.entries.push_back({d, weight});
      }
    }
    members.first.push_back(static_cast<int64_t>(members.entries.size()));
  }
  return members;
}

Membership members_of(std::string_view op, const at::Tensor& labels, int64_t num_domains) {
  return labels.dim() == 1 ? members_by_id(op, labels, num_domains) : members_by_weight(op, labels, num_domains);
}

// Sizes of the dense problem: leading dimensions folded into one.
struct Extent {
  explicit Extent(const at::Tensor& segment_sums)
      : segments(segment_sums.size(-2)), experts(segment_sums.size(-1)), layers(1) {
    for (int64_t i = 0; i + 2 < segment_sums.dim(); ++i) {
      layers *= segment_sums.size(i);
    }
  }
  int64_t column_blocks() const {
    return (experts + kColumns - 1) / kColumns;
  }
  int64_t segments;
  int64_t experts;
  int64_t layers;
};

template <typename Scalar>
struct Segments {
  const Scalar* sums; //   [L, S, E]
  const Scalar* counts; // [L, S] or [S]
  int64_t counts_stride; // S, or 0 where counts are shared
};

template <typename Scalar>
Segments<Scalar> view_segments(const at::Tensor& sums, const at::Tensor& counts, const Extent& extent) {
  const bool shared = counts.dim() == 1 && sums.dim() > 2;
  return {sums.const_data_ptr<Scalar>(), counts.const_data_ptr<Scalar>(), shared ? 0 : extent.segments};
}

// A count that is NaN stands for a mistake made upstream and must stay visible: only counts of 0 and below are empty.
template <typename Scalar>
bool is_empty(Scalar count) {
  return count <= 0;
}

// Rows of one layer, columns [begin, end): sums and squares start at zero.
template <typename Scalar>
void add_segments(
    const Segments<Scalar>& segments,
    const Extent& extent,
    const Membership& members,
    int64_t layer,
    int64_t begin,
    int64_t end,
    double* sums, //    [D, E]
    double* squares) { // [D, E] or null
  for (int64_t s = 0; s < extent.segments; ++s) {
    const double count = segments.counts[layer * segments.counts_stride + s];
    if (is_empty(count) || members.first[s] == members.first[s + 1]) {
      continue;
    }
    const Scalar* row = segments.sums + (layer * extent.segments + s) * extent.experts;
    for (int64_t i = members.first[s]; i < members.first[s + 1]; ++i) {
      const auto [domain, weight] = members.entries[i];
      double* out = sums + domain * extent.experts;
      for (int64_t e = begin; e < end; ++e) {
        out[e] += weight * (row[e] / count);
      }
      if (squares != nullptr) {
        double* out_squares = squares + domain * extent.experts;
        for (int64_t e = begin; e < end; ++e) {
          const double x = row[e] / count;
          out_squares[e] += weight * (x * x);
        }
      }
    }
  }
}

template <typename Scalar>
void count_weights(
    const Segments<Scalar>& segments,
    const Extent& extent,
    const Membership& members,
    int64_t num_domains,
    double* counts) {
  for (int64_t layer = 0; layer < extent.layers; ++layer) {
    for (int64_t s = 0; s < extent.segments; ++s) {
      const Scalar count = segments.counts[layer * segments.counts_stride + s];
      for (int64_t i = members.first[s]; i < members.first[s + 1] && !is_empty(count); ++i) {
        counts[layer * num_domains + members.entries[i].domain] += members.entries[i].weight;
      }
    }
  }
}

template <typename Scalar>
void sum_domains(
    const Segments<Scalar>& segments,
    const Extent& extent,
    const Membership& members,
    int64_t num_domains,
    double* sums,
    double* squares,
    double* counts) {
  const int64_t blocks = extent.column_blocks();
  const int64_t layer_size = num_domains * extent.experts;
  const int64_t task_elements = extent.segments * std::min(kColumns, extent.experts);
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, task_elements));
  at::parallel_for(0, extent.layers * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t layer = task / blocks;
      const int64_t column = task % blocks * kColumns;
      add_segments(
          segments, extent, members, layer, column, std::min(column + kColumns, extent.experts),
          sums + layer * layer_size, squares == nullptr ? nullptr : squares + layer * layer_size);
    }
  });
  count_weights(segments, extent, members, num_domains, counts);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> domain_moments_cpu(
    const at::Tensor& segment_sums,
    const at::Tensor& segment_counts,
    const at::Tensor& labels,
    int64_t num_domains,
    bool squares,
    std::string_view op) {
  check_domain_moments(op, segment_sums, segment_counts, labels, num_domains);
  check_memory(op, segment_sums, segment_counts, labels);
  const at::Tensor rows = segment_sums.contiguous();
  const at::Tensor row_counts = segment_counts.contiguous();
  const Extent extent(rows);
  const Membership members = members_of(op, labels, num_domains);
  const auto options = rows.options().dtype(at::kDouble);
  at::DimVector shape(rows.sizes().begin(), rows.sizes().end());
  shape[shape.size() - 2] = num_domains;
  at::Tensor sums = at::zeros(shape, options);
  at::Tensor squared = squares ? at::zeros(shape, options) : at::empty({0}, options);
  shape.pop_back();
  at::Tensor counts = at::zeros(shape, options);
  double* squares_out = squares ? squared.mutable_data_ptr<double>() : nullptr;
  if (rows.scalar_type() == at::kDouble) {
    sum_domains(
        view_segments<double>(rows, row_counts, extent), extent, members, num_domains, sums.mutable_data_ptr<double>(),
        squares_out, counts.mutable_data_ptr<double>());
  } else {
    sum_domains(
        view_segments<float>(rows, row_counts, extent), extent, members, num_domains, sums.mutable_data_ptr<double>(),
        squares_out, counts.mutable_data_ptr<double>());
  }
  return {sums, squared, counts};
}

// One segment's gradient: Σ_d w_sd / count (grad_sums[d] + 2 x grad_squares[d]).
template <typename Scalar>
void spread_to_segment(
    const Membership& members,
    int64_t s,
    double count,
    const Scalar* row, //           [E] segment_sums
    int64_t num_experts,
    const double* grad_sums, //     [D, E]
    const double* grad_squares, //  [D, E] or null
    double* total, //               [E] scratch
    Scalar* out) { //               [E]
  std::fill_n(total, num_experts, 0.0);
  for (int64_t i = members.first[s]; i < members.first[s + 1] && !is_empty(count); ++i) {
    const auto [domain, weight] = members.entries[i];
    const double scale = weight / count;
    const double* grad = grad_sums + domain * num_experts;
    for (int64_t e = 0; e < num_experts; ++e) {
      total[e] += scale * grad[e];
    }
    if (grad_squares != nullptr) {
      const double* grad2 = grad_squares + domain * num_experts;
      for (int64_t e = 0; e < num_experts; ++e) {
        total[e] += scale * (2.0 * (row[e] / count)) * grad2[e];
      }
    }
  }
  for (int64_t e = 0; e < num_experts; ++e) {
    out[e] = static_cast<Scalar>(total[e]);
  }
}

template <typename Scalar>
void spread_to_segments(
    const Segments<Scalar>& segments,
    const Extent& extent,
    const Membership& members,
    const at::Tensor& grad_sums, //    [..., D, E]
    const at::Tensor& grad_squares, // [..., D, E] or 0 elements
    at::Tensor& grad_segments) { //    [..., S, E]
  const int64_t layer_size = grad_sums.size(-2) * extent.experts;
  const double* grad = grad_sums.const_data_ptr<double>();
  const double* grad2 = grad_squares.dim() == grad_sums.dim() ? grad_squares.const_data_ptr<double>() : nullptr;
  Scalar* out = grad_segments.mutable_data_ptr<Scalar>();
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, extent.experts));
  at::parallel_for(0, extent.layers * extent.segments, grain, [&](int64_t begin, int64_t end) {
    std::vector<double> total(extent.experts);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t layer = i / extent.segments;
      const int64_t s = i % extent.segments;
      spread_to_segment<Scalar>(
          members, s, segments.counts[layer * segments.counts_stride + s], segments.sums + i * extent.experts,
          extent.experts, grad + layer * layer_size, grad2 == nullptr ? nullptr : grad2 + layer * layer_size,
          total.data(), out + i * extent.experts);
    }
  });
}

at::Tensor domain_moments_backward_cpu(
    const at::Tensor& grad_sums,
    const at::Tensor& grad_squares,
    const at::Tensor& segment_sums,
    const at::Tensor& segment_counts,
    const at::Tensor& labels,
    std::string_view op) {
  check_domain_moments_backward(op, grad_sums, grad_squares, segment_sums, segment_counts, labels);
  check_memory(op, grad_sums, grad_squares, segment_sums, segment_counts, labels);
  const at::Tensor rows = segment_sums.contiguous();
  const at::Tensor row_counts = segment_counts.contiguous();
  const at::Tensor dense_grad = grad_sums.contiguous();
  const at::Tensor dense_grad_squares = grad_squares.contiguous();
  const Extent extent(rows);
  const Membership members = members_of(op, labels, dense_grad.size(-2));
  at::Tensor grad_segments = at::empty(rows.sizes(), rows.options());
  if (rows.scalar_type() == at::kDouble) {
    spread_to_segments(
        view_segments<double>(rows, row_counts, extent), extent, members, dense_grad, dense_grad_squares,
        grad_segments);
  } else {
    spread_to_segments(
        view_segments<float>(rows, row_counts, extent), extent, members, dense_grad, dense_grad_squares, grad_segments);
  }
  return grad_segments;
}

} // namespace
} // namespace edl::cpu

TORCH_LIBRARY_IMPL(edl, CPU, m) {
  m.impl("domain_moments", edl::cpu::domain_moments_cpu);
  m.impl("_domain_moments_backward", edl::cpu::domain_moments_backward_cpu);
}
