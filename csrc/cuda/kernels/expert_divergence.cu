// expert_divergence and pairwise_divergence on CUDA: moments [L, D, E] → pairs [L, D, D], loss [L] and its gradient to
// sums and squares [L, D, E], all float64.
//
// 1. `pair_divergences`: a warp per pair j < k, lanes over the experts. One block of each layer lists the domains that
//    take part, in order.
// 2. `divergence_gradients`: a block per domain j and 32 columns; its 8 warps take the partners k of the list in turn,
//    and their sums are added warp after warp. A further block per layer adds up the loss, pair after pair of the list,
//    so that no bit depends on the domains that are absent. For `log_of_mean` the gradient needs that sum first, so
//    `divergence_losses` runs in between.
// With m = (p + q)/2 and u = (p - q)/(p + q), as on the CPU:
//   D = 1/2 Σ m φ(u),  φ(u) = (1+u) log(1+u) + (1-u) log(1-u) = Σ_n u^2n / (n (2n - 1)),  dD/dp = 1/2 log(p/m);
// the series where |u| < 0.3, where the logarithms cancel; a log ratio is at least log(2^-126), so that a probability of
// zero has a finite slope. Cost: D²/2 pairs of 2 E logarithms, D² E for the gradient.
#include "cuda/kernels/expert_divergence.h"

#include "cuda/kernels/elements.cuh"
#include "cuda/kernels/warps.cuh"

namespace edl::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr double kSmallest = std::numeric_limits<double>::min();
constexpr double kLowestLogRatio = -87.33654475055310; // log(2^-126)
constexpr double kSeriesBelow = 0.09; // of u²: above it the logarithms cancel little

// Written so that a NaN count takes part and shows.
__device__ inline bool takes_part(double count, bool with_variance) {
  return with_variance ? !(count < 2) : !(count <= 0);
}

// A NaN is never smaller.
__device__ inline double at_least(double x, double lowest) {
  return x < lowest ? lowest : x;
}

// Mean of a domain's segments at one expert, and the unbiased variance of that mean.
__device__ inline double mean_of(double sum, double count) {
  return sum / count;
}
__device__ inline double variance_of(double sum, double square, double count) {
  const double variance = (square - sum * (sum / count)) / (count - 1);
  return variance < 0 ? 0.0 : variance / count; // below 0 by rounding alone
}

// φ(u) / u² for u² < kSeriesBelow: Σ_n s^(n-1) / (n (2n - 1)), s = u².
__device__ inline double series(double s) {
  constexpr int kTerms = 14;
  double sum = 0;
#pragma unroll
  for (int n = kTerms; n > 0; --n) {
    sum = sum * s + 1.0 / (n * (2 * n - 1));
  }
  return sum;
}

// (p - q) / (p + q); NaN for a negative p or q, which is no probability.
__device__ inline double asymmetry(double p, double q) {
  return p < 0 || q < 0 ? kNan<double> : (p - q) / at_least(p + q, kSmallest);
}

// log(p / m), accurate near 0. A probability below the smallest normal number counts as that number.
__device__ inline double log_ratio(double p, double q) {
  const double u = asymmetry(p, q);
  if (u * u < kSeriesBelow && p >= kSmallest && q >= kSmallest) {
    return log1p(u);
  }
  const double ratio = at_least(p, kSmallest) / at_least(0.5 * (p + q), kSmallest);
  return at_least(log(ratio), kLowestLogRatio) + 0 * u; // keeps a NaN
}

// The term of one expert in 2 D.
__device__ inline double divergence_term(double p, double q) {
  const double u = asymmetry(p, q);
  const double s = u * u;
  return s < kSeriesBelow ? 0.5 * (p + q) * s * series(s) : p * log_ratio(p, q) + q * log_ratio(q, p);
}

// One over 8 m; an expert that neither domain uses has no variance either.
__device__ inline double inverse_mean(double p, double q) {
  const double m = 0.5 * (p + q);
  return m < kSmallest ? 0.0 : 0.125 / m;
}

// ---- pass 1 ----

// The number of a layer's domains that take part, and these in order; all threads of a block call.
__device__ void list_present(const DomainMoments& moments, int64_t layer, int32_t* present) {
  __shared__ int scratch[kWarps];
  const bool with_bias = moments.squares != nullptr;
  const double* counts = moments.counts + layer * moments.num_domains;
  int before = 0;
  for (int64_t first = 0; first < moments.num_domains; first += kThreads) {
    const int64_t d = first + threadIdx.x;
    const bool is_present = d < moments.num_domains && takes_part(counts[d], with_bias);
    int total;
    const int at = before + block_exclusive_sum(is_present ? 1 : 0, scratch, &total);
    if (is_present) {
      present[1 + at] = static_cast<int32_t>(d);
    }
    before += total;
  }
  if (threadIdx.x == 0) {
    present[0] = before;
  }
}

__global__ void __launch_bounds__(kThreads)
    pair_divergences(DomainMoments moments, bool subtract_bias, double* divergences, double* biases, int32_t* present) {
  const int64_t num_domains = moments.num_domains;
  const int64_t num_experts = moments.num_experts;
  const int lane = threadIdx.x % kWarp;
  const int64_t row = blockIdx.x; // l * D + j
  const int64_t j = row % num_domains;
  const int64_t layer_row = row - j;
  const int64_t k = static_cast<int64_t>(blockIdx.y) * kWarps + threadIdx.x / kWarp;
  if (present != nullptr && j == 0 && blockIdx.y == 0) {
    const int64_t layer = row / num_domains;
    list_present(moments, layer, present + layer * (num_domains + 1));
  }
  if (k < j || k >= num_domains) {
    return; // the whole warp
  }
  const bool with_bias = moments.squares != nullptr;
  const double count_j = moments.counts[row];
  const double count_k = moments.counts[layer_row + k];
  double divergence = kNan<double>;
  double bias = 0;
  if (takes_part(count_j, with_bias) && takes_part(count_k, with_bias)) {
    divergence = 0;
    for (int64_t e = lane; e < num_experts && j != k; e += kWarp) {
      const int64_t at_j = row * num_experts + e;
      const int64_t at_k = (layer_row + k) * num_experts + e;
      const double p = mean_of(moments.sums[at_j], count_j);
      const double q = mean_of(moments.sums[at_k], count_k);
      divergence += divergence_term(p, q);
      if (with_bias) {
        const double variance = variance_of(moments.sums[at_j], moments.squares[at_j], count_j) +
            variance_of(moments.sums[at_k], moments.squares[at_k], count_k);
        bias += variance * inverse_mean(p, q);
      }
    }
    divergence = 0.5 * team_sum(divergence, kWarp);
    divergence = divergence < 0 ? 0.0 : divergence;
    bias = team_sum(bias, kWarp);
  }
  if (lane == 0) {
    const int64_t here = row * num_domains + k;
    const int64_t mirrored = (layer_row + k) * num_domains + j;
    const double value = subtract_bias ? divergence - bias : divergence;
    divergences[here] = value;
    divergences[mirrored] = value;
    if (biases != nullptr) {
      biases[here] = bias;
      biases[mirrored] = bias;
    }
  }
}

// ---- pass 2 ----

// The domains of a layer that take part.
struct Present {
  __device__ Present(const DomainMoments& moments, const DivergenceLoss& loss, int64_t layer)
      : domains(loss.present + layer * (moments.num_domains + 1) + 1), count(domains[-1]) {}
  __device__ double pairs() const {
    return 0.5 * static_cast<double>(count) * static_cast<double>(count - 1);
  }

  const int32_t* domains;
  int64_t count;
};

// The factor before the slopes of D. Where the denominator is 0 the domains are equal and eps is 0: a saddle, with zero
// gradient.
__device__ inline double slope_factor(double denominator, double pairs) {
  return denominator == 0 ? 0.0 : -1.0 / (denominator * pairs);
}

// Loss and mean over the pairs of one layer, by a block.
__device__ void write_loss(const DomainMoments& moments, const DivergenceLoss& loss, int64_t layer) {
  __shared__ double scratch[kWarps];
  const int64_t num_domains = moments.num_domains;
  const double* divergences = loss.divergences + layer * num_domains * num_domains;
  const Present present(moments, loss, layer);
  const double pairs = present.pairs();
  double terms = 0;
  for (int64_t i = threadIdx.x; i < present.count * present.count; i += kThreads) {
    const int64_t j = i / present.count;
    const int64_t k = i % present.count;
    if (j < k) {
      const double divergence = divergences[present.domains[j] * num_domains + present.domains[k]];
      terms += loss.log_of_mean ? divergence : -log(divergence + loss.eps);
    }
  }
  terms = block_sum(terms, scratch);
  if (threadIdx.x == 0) {
    const double mean = terms / pairs;
    loss.means[layer] = mean;
    loss.loss[layer] = pairs < 1 ? 0.0 : loss.log_of_mean ? -log(mean + loss.eps) : mean;
  }
}

__global__ void __launch_bounds__(kThreads) divergence_losses(DomainMoments moments, DivergenceLoss loss) {
  write_loss(moments, loss, blockIdx.x);
}

// What the pairs of domain j add to the gradient at one expert, in terms of the mean and of its variance.
struct Slopes {
  double by_mean;
  double by_spread;
};

__device__ void add_slopes(
    const DomainMoments& moments,
    const DivergenceLoss& loss,
    int64_t row, //   l * D + j
    int64_t other, // l * D + k
    int64_t e,
    double pairs,
    Slopes* slopes) {
  const int64_t num_experts = moments.num_experts;
  const int64_t pair = row * moments.num_domains + other % moments.num_domains;
  const double count_j = moments.counts[row];
  const double count_k = moments.counts[other];
  const double sum_j = moments.sums[row * num_experts + e];
  const double sum_k = moments.sums[other * num_experts + e];
  const double p = mean_of(sum_j, count_j);
  const double q = mean_of(sum_k, count_k);
  const double divergence = loss.divergences[pair];
  double factor = loss.log_of_mean ? 1.0 : slope_factor(divergence + loss.eps, pairs);
  if (moments.squares != nullptr) {
    const double bias = loss.biases[pair];
    const double larger = divergence < bias ? bias : divergence; // a NaN on either side stays
    factor = slope_factor(larger + bias + loss.eps, pairs);
    const double variance = variance_of(sum_j, moments.squares[row * num_experts + e], count_j) +
        variance_of(sum_k, moments.squares[other * num_experts + e], count_k);
    const double inverse = inverse_mean(p, q);
    slopes->by_mean -= factor * (-4.0 * variance * inverse * inverse); // d(1 / 8m)/dp = -4 (1 / 8m)²
    slopes->by_spread -= factor * inverse;
  }
  slopes->by_mean += factor * (0.5 * log_ratio(p, q));
}

// From means and variances of means to sums and squares: p = Σx/n, V/n = (Σx² - n p²) / (n (n - 1)).
__device__ void write_gradient(
    const DomainMoments& moments, const DivergenceLoss& loss, int64_t row, int64_t e, double scale, Slopes slopes) {
  const int64_t at = row * moments.num_experts + e;
  const double n = moments.counts[row];
  double grad_sum = scale * slopes.by_mean / n;
  if (moments.squares != nullptr) {
    const double by_variance_sum = slopes.by_spread / (n * (n - 1));
    grad_sum -= by_variance_sum * 2.0 * mean_of(moments.sums[at], n);
    loss.grad_squares[at] = by_variance_sum;
  }
  loss.grad_sums[at] = grad_sum;
}

__global__ void __launch_bounds__(kThreads, 3) divergence_gradients(DomainMoments moments, DivergenceLoss loss) {
  __shared__ Slopes shared[kWarps][kWarp];
  const int64_t rows = moments.num_layers * moments.num_domains;
  if (blockIdx.x >= rows) { // the further block of a layer; not there for log_of_mean
    if (blockIdx.y == 0) {
      write_loss(moments, loss, blockIdx.x - rows);
    }
    return;
  }
  const int64_t row = blockIdx.x; // l * D + j
  const int64_t layer = row / moments.num_domains;
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int64_t e = static_cast<int64_t>(blockIdx.y) * kWarp + lane;
  const bool inside = e < moments.num_experts;
  const bool with_bias = moments.squares != nullptr;
  const Present present(moments, loss, layer);
  const double pairs = present.pairs();
  const bool has_pair = takes_part(moments.counts[row], with_bias) && pairs >= 1;
  Slopes slopes = {0, 0};
  for (int64_t k = warp; k < present.count && has_pair && inside; k += kWarps) {
    const int64_t other = layer * moments.num_domains + present.domains[k];
    if (other != row) {
      add_slopes(moments, loss, row, other, e, pairs, &slopes);
    }
  }
  shared[warp][lane] = slopes;
  __syncthreads();
  if (warp > 0 || !inside) {
    return;
  }
  for (int w = 1; w < kWarps; ++w) {
    slopes.by_mean += shared[w][lane].by_mean;
    slopes.by_spread += shared[w][lane].by_spread;
  }
  if (has_pair) {
    const double scale = loss.log_of_mean ? slope_factor(loss.means[layer] + loss.eps, pairs) : 1.0;
    write_gradient(moments, loss, row, e, scale, slopes);
    return;
  }
  loss.grad_sums[row * moments.num_experts + e] = 0;
  if (with_bias) {
    loss.grad_squares[row * moments.num_experts + e] = 0;
  }
}

} // namespace

void launch_pair_divergences(
    const DomainMoments& moments,
    bool subtract_bias,
    double* divergences,
    double* biases,
    int32_t* present,
    cudaStream_t stream) {
  const dim3 blocks(
      static_cast<unsigned>(moments.num_layers * moments.num_domains),
      static_cast<unsigned>(divide_up(moments.num_domains, kWarps)));
  EDL_LAUNCH(pair_divergences, blocks, kThreads, 0, stream, moments, subtract_bias, divergences, biases, present);
}

void launch_divergence_loss(const DomainMoments& moments, const DivergenceLoss& loss, cudaStream_t stream) {
  const bool with_gradient = loss.grad_sums != nullptr;
  const auto layers = static_cast<unsigned>(moments.num_layers);
  if (loss.log_of_mean || !with_gradient) {
    EDL_LAUNCH(divergence_losses, layers, kThreads, 0, stream, moments, loss);
  }
  if (with_gradient) {
    const auto rows = static_cast<unsigned>(moments.num_layers * moments.num_domains);
    const dim3 blocks(
        loss.log_of_mean ? rows : rows + layers, static_cast<unsigned>(divide_up(moments.num_experts, kWarp)));
    EDL_LAUNCH(divergence_gradients, blocks, kThreads, 0, stream, moments, loss);
  }
}

} // namespace edl::cuda
