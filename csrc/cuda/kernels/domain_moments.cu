// domain_moments on CUDA: segment sums [L, S, E] and counts [L, S] → sums, squares [L, D, E] and counts [L, D],
// float64.
//
// A block has one layer, one domain and 32 columns. It lists the domain's segments, 256 candidates at a time, in order;
// its 8 warps take them in turn, and their sums are added warp after warp: the order depends on the labels alone. A
// label outside [-1, D), or a weight that is negative or not finite, makes sums and counts NaN. Cost: one read of the
// segments that have a domain, and D · E/32 reads of the labels and counts.
//
// Backward: a block per segment, its gradient is Σ_d w_sd / count (grad_sums[d] + 2 x grad_squares[d]).
#include "cuda/kernels/domain_moments.h"

#include "cuda/kernels/elements.cuh"
#include "cuda/kernels/warps.cuh"

namespace edl::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

template <typename Scalar>
struct Segments {
  const Scalar* sums;
  const Scalar* counts;
  int64_t counts_stride; // S, or 0 where counts are shared
  Ids ids;
  const double* weights; // [S, D] or null
  int64_t num_segments;
  int64_t num_domains;
  int64_t num_experts;
};

// A count that is NaN stands for a mistake made upstream and must stay visible: only counts of 0 and below are empty.
__device__ inline bool is_empty(double count) {
  return count <= 0;
}

// What segment s weighs in domain d; NaN where its label is not allowed.
template <typename Scalar>
__device__ inline double weight_of(const Segments<Scalar>& segments, int64_t s, int64_t d) {
  if (segments.weights != nullptr) {
    const double weight = segments.weights[s * segments.num_domains + d];
    return weight >= 0 && weight < kInfinity<double> ? weight : kNan<double>;
  }
  const int64_t id = id_at(segments.ids, s);
  if (id < -1 || id >= segments.num_domains) {
    return kNan<double>;
  }
  return id == d ? 1.0 : 0.0;
}

// The segments of one domain among kThreads candidates.
struct MemberList {
  int segment[kThreads]; // relative to the first candidate
  double weight[kThreads];
  double count[kThreads];
  int scratch[kWarps];
};

template <typename Scalar>
__global__ void __launch_bounds__(kThreads)
    sum_domains(Segments<Scalar> segments, double* sums, double* squares, double* counts) {
  __shared__ MemberList list;
  __shared__ double shared_sums[kWarps][kWarp];
  __shared__ double shared_squares[kWarps][kWarp];
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int64_t layer = blockIdx.x / segments.num_domains;
  const int64_t domain = blockIdx.x % segments.num_domains;
  const int64_t e = static_cast<int64_t>(blockIdx.y) * kWarp + lane;
  const Scalar* rows = segments.sums + layer * segments.num_segments * segments.num_experts;
  const Scalar* row_counts = segments.counts + layer * segments.counts_stride;

  double sum = 0;
  double square = 0;
  double weights = 0;
  bool wrong = false;
  for (int64_t first = 0; first < segments.num_segments; first += kThreads) {
    const int64_t s = first + threadIdx.x;
    double weight = 0;
    double count = 0;
    if (s < segments.num_segments) {
      weight = weight_of(segments, s, domain);
      count = static_cast<double>(row_counts[s]);
      wrong |= weight != weight;
    }
    const bool taken = weight > 0 && !is_empty(count);
    int members;
    const int at = block_exclusive_sum(taken ? 1 : 0, list.scratch, &members);
    if (taken) {
      list.segment[at] = threadIdx.x;
      list.weight[at] = weight;
      list.count[at] = count;
      weights += weight;
    }
    __syncthreads();
    for (int i = warp; i < members && e < segments.num_experts; i += kWarps) {
      const Scalar sum_of_segment = rows[(first + list.segment[i]) * segments.num_experts + e];
      const double x = static_cast<double>(sum_of_segment) / list.count[i];
      sum += list.weight[i] * x;
      square += list.weight[i] * (x * x);
    }
    __syncthreads(); // the list is read until here
  }
  shared_sums[warp][lane] = sum;
  shared_squares[warp][lane] = square;
  const bool any_wrong = __syncthreads_or(wrong);
  __shared__ double weight_sums[kWarps];
  const double all_weights = block_sum(weights, weight_sums);
  if (threadIdx.x == 0 && blockIdx.y == 0) {
    counts[blockIdx.x] = any_wrong ? kNan<double> : all_weights;
  }
  if (warp == 0 && e < segments.num_experts) {
    double total = 0;
    double total_square = 0;
    for (int w = 0; w < kWarps; ++w) {
      total += shared_sums[w][lane];
      total_square += shared_squares[w][lane];
    }
    const int64_t out = static_cast<int64_t>(blockIdx.x) * segments.num_experts + e;
    sums[out] = any_wrong ? kNan<double> : total;
    if (squares != nullptr) {
      squares[out] = any_wrong ? kNan<double> : total_square;
    }
  }
}

template <typename Scalar>
__global__ void __launch_bounds__(kThreads) spread_to_segments(
    Segments<Scalar> segments, const double* grad_sums, const double* grad_squares, Scalar* grad_segment_sums) {
  const int64_t layer = blockIdx.x / segments.num_segments;
  const int64_t s = blockIdx.x % segments.num_segments;
  const double count = static_cast<double>(segments.counts[layer * segments.counts_stride + s]);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * segments.num_experts;
  const int64_t layer_row = layer * segments.num_domains;
  // An id names one domain; weights may name all.
  const int64_t id = segments.weights == nullptr ? id_at(segments.ids, s) : 0;
  const bool wrong = id < -1 || id >= segments.num_domains;
  const int64_t first = segments.weights == nullptr ? id : 0;
  const int64_t last = segments.weights == nullptr ? id + 1 : segments.num_domains;
  for (int64_t e = threadIdx.x; e < segments.num_experts; e += blockDim.x) {
    const double x = static_cast<double>(segments.sums[row + e]) / count;
    double total = 0;
    for (int64_t d = first; d < last && !wrong && first >= 0 && !is_empty(count); ++d) {
      const double weight = weight_of(segments, s, d);
      if (weight == 0) {
        continue;
      }
      const int64_t at = (layer_row + d) * segments.num_experts + e;
      total += weight / count * grad_sums[at];
      if (grad_squares != nullptr) {
        total += weight / count * (2 * x) * grad_squares[at];
      }
    }
    grad_segment_sums[row + e] = static_cast<Scalar>(wrong ? kNan<double> : total);
  }
}

template <typename Scalar>
Segments<Scalar> segments_of(const LabelledSegments& segments) {
  return {
      static_cast<const Scalar*>(segments.sums),
      static_cast<const Scalar*>(segments.counts),
      segments.counts_are_shared ? 0 : segments.num_segments,
      {segments.labels, segments.labels_are_64_bit},
      segments.labels_are_weights ? static_cast<const double*>(segments.labels) : nullptr,
      segments.num_segments,
      segments.num_domains,
      segments.num_experts};
}

template <typename Function>
void with_scalar(bool is_float64, const Function& function) {
  if (is_float64) {
    function.template operator()<double>();
  } else {
    function.template operator()<float>();
  }
}

} // namespace

void launch_domain_moments(
    const LabelledSegments& segments, double* sums, double* squares, double* counts, cudaStream_t stream) {
  const dim3 blocks(
      static_cast<unsigned>(segments.num_layers * segments.num_domains),
      static_cast<unsigned>(segments.num_experts > 0 ? divide_up(segments.num_experts, kWarp) : 1));
  with_scalar(segments.are_float64, [&]<typename Scalar>() {
    EDL_LAUNCH(sum_domains<Scalar>, blocks, kThreads, 0, stream, segments_of<Scalar>(segments), sums, squares, counts);
  });
}

void launch_domain_moments_backward(
    const LabelledSegments& segments,
    const double* grad_sums,
    const double* grad_squares,
    void* grad_segment_sums,
    cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(segments.num_layers * segments.num_segments);
  with_scalar(segments.are_float64, [&]<typename Scalar>() {
    EDL_LAUNCH(
        spread_to_segments<Scalar>, blocks, kThreads, 0, stream, segments_of<Scalar>(segments), grad_sums, grad_squares,
        static_cast<Scalar*>(grad_segment_sums));
  });
}

} // namespace edl::cuda
