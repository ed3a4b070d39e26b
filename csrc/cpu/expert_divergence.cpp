// expert_divergence on the CPU: moments [L, D, E] → loss [L] and, where wanted, its gradient to sums and squares,
// float64.
//
// The pairs of a layer are cut into a fixed number of chunks of neighbouring rows j < k with about the same number of
// pairs; each chunk has its own gradient table, and the tables are added in order: any number of threads gives the same
// bits. Cost: D²/2 pairs of E logarithms per layer; one pass gives value and gradient.
#include "ops/expert_divergence.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/tensors.h"
#include "cpu/domain_means.h"
#include "cpu/isa/expert_divergence.h"

namespace edl::cpu {
namespace {

constexpr int64_t kMostChunks = 8;
constexpr int64_t kPairElementsPerChunk = 1 << 12;
constexpr int64_t kChunkTableBytes = 64 << 20; // all tables of a layer together

struct Rule {
  PairReduction reduction;
  double eps;
  bool bias_correction;
  bool with_gradient;
};

// What one chunk of pairs adds up. Tables are in terms of the domain means and of the variances of the means.
struct ChunkSums {
  double terms = 0; //               Σ -log(D + eps), or Σ D
  std::vector<double> by_mean; //    [M, width] dL/dp, or dΣD/dp
  std::vector<double> by_spread; //  [M, width] dL/d(V/n)
};

struct Scratch {
  explicit Scratch(int64_t width) : slope_p(width), slope_q(width), bias_slope(width), inverse(width) {}
  std::vector<double> slope_p, slope_q, bias_slope, inverse;
};

// The factor before the slopes of D: of -log(D + eps), or of the corrected gradient. Where the denominator is 0 the
// domains are equal and eps is 0: a saddle, with zero gradient.
double slope_factor(double denominator, double pairs) {
  return denominator == 0 ? 0.0 : -1.0 / (denominator * pairs);
}

void add_pair(
    const DomainMeans& layer, int64_t j, int64_t k, const Rule& rule, double pairs, Scratch& scratch, ChunkSums& sums) {
  const ExpertDivergenceLoops& loops = expert_divergence_loops();
  const int64_t width = layer.width;
  double* slope_p = rule.with_gradient ? scratch.slope_p.data() : nullptr;
  const double divergence = loops.divergence(
      layer.mean(j), layer.mean(k), layer.log_mean(j), layer.log_mean(k), width, slope_p, scratch.slope_q.data());
  const bool logs = rule.reduction == PairReduction::mean_of_logs;
  sums.terms += logs ? -std::log(divergence + rule.eps) : divergence;
  if (!rule.with_gradient) {
    return;
  }
  double factor = logs ? slope_factor(divergence + rule.eps, pairs) : 1.0;
  if (rule.bias_correction) {
    const double bias = loops.bias(
        layer.mean(j), layer.mean(k), layer.variance_of(j), layer.variance_of(k), width, scratch.bias_slope.data(),
        scratch.inverse.data());
    // max(D, b), but a NaN on either side stays.
    const double larger = divergence < bias ? bias : divergence;
    factor = slope_factor(larger + bias + rule.eps, pairs);
    for (const int64_t d : {j, k}) {
      loops.add_scaled(-factor, scratch.bias_slope.data(), width, sums.by_mean.data() + d * width);
      loops.add_scaled(-factor, scratch.inverse.data(), width, sums.by_spread.data() + d * width);
    }
  }
  loops.add_scaled(factor, scratch.slope_p.data(), width, sums.by_mean.data() + j * width);
  loops.add_scaled(factor, scratch.slope_q.data(), width, sums.by_mean.data() + k * width);
}

// Rows j of the triangle of pairs, cut so that every chunk has about the same number of pairs. Depends on sizes alone.
std::vector<int64_t> chunk_rows(const DomainMeans& layer, int64_t pairs) {
  const int64_t size = layer.size();
  const int64_t table_bytes = std::max<int64_t>(1, size * layer.width * static_cast<int64_t>(sizeof(double)));
  const int64_t by_memory = std::max<int64_t>(1, kChunkTableBytes / table_bytes);
  const int64_t by_work = std::max<int64_t>(1, pairs * layer.width / kPairElementsPerChunk);
  const int64_t chunks = std::min({kMostChunks, by_memory, by_work});
  std::vector<int64_t> rows = {0};
  int64_t seen = 0;
  for (int64_t j = 0; j < size; ++j) {
    seen += size - 1 - j;
    if (seen * chunks >= pairs * static_cast<int64_t>(rows.size()) && j + 1 < size) {
      rows.push_back(j + 1);
    }
  }
  rows.push_back(size);
  return rows;
}

std::vector<ChunkSums> add_all_pairs(const DomainMeans& layer, const Rule& rule, int64_t pairs) {
  const std::vector<int64_t> rows = chunk_rows(layer, pairs);
  std::vector<ChunkSums> chunks(rows.size() - 1);
  at::parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(layer.width);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      ChunkSums& sums = chunks[chunk];
      sums.by_mean.assign(rule.with_gradient ? layer.size() * layer.width : 0, 0.0);
      sums.by_spread.assign(rule.with_gradient && rule.bias_correction ? layer.size() * layer.width : 0, 0.0);
      for (int64_t j = rows[chunk]; j < rows[chunk + 1]; ++j) {
        for (int64_t k = j + 1; k < layer.size(); ++k) {
          add_pair(layer, j, k, rule, static_cast<double>(pairs), scratch, sums);
        }
      }
    }
  });
  return chunks;
}

// From means and variances of means to sums and squares: p = Σx/n, V/n = (Σx² - n p²) / (n (n - 1)).
void write_gradient(
    const DomainMeans& layer,
    const std::vector<ChunkSums>& chunks,
    double scale,
    int64_t num_experts,
    double* grad_sums, //      [D, E], zeros
    double* grad_squares) { // [D, E], zeros; or null
  const bool with_squares = grad_squares != nullptr;
  std::vector<double> by_mean(layer.width);
  std::vector<double> by_spread(with_squares ? layer.width : 0);
  const auto add_chunks = [&](std::vector<double> ChunkSums::* table, int64_t row, std::vector<double>& total) {
    std::fill(total.begin(), total.end(), 0.0);
    for (const ChunkSums& chunk : chunks) {
      expert_divergence_loops().add_scaled(1.0, (chunk.*table).data() + row, layer.width, total.data());
    }
  };
  for (int64_t j = 0; j < layer.size(); ++j) {
    const double n = layer.counts[j];
    const int64_t row = j * layer.width;
    double* out = grad_sums + layer.domains[j] * num_experts;
    add_chunks(&ChunkSums::by_mean, row, by_mean);
    for (int64_t e = 0; e < num_experts; ++e) {
      out[e] = scale * by_mean[e] / n;
    }
    if (with_squares) {
      double* out_squares = grad_squares + layer.domains[j] * num_experts;
      add_chunks(&ChunkSums::by_spread, row, by_spread);
      for (int64_t e = 0; e < num_experts; ++e) {
        const double by_variance_sum = by_spread[e] / (n * (n - 1));
        out[e] -= by_variance_sum * 2.0 * layer.means[row + e];
        out_squares[e] = by_variance_sum;
      }
    }
  }
}

double layer_loss(
    const DomainMeans& layer, const Rule& rule, int64_t num_experts, double* grad_sums, double* grad_squares) {
  const int64_t pairs = layer.size() * (layer.size() - 1) / 2;
  if (pairs <= 0) {
    return 0.0;
  }
  const std::vector<ChunkSums> chunks = add_all_pairs(layer, rule, pairs);
  double terms = 0;
  for (const ChunkSums& chunk : chunks) {
    terms += chunk.terms;
  }
  const double mean = terms / static_cast<double>(pairs);
  const bool logs = rule.reduction == PairReduction::mean_of_logs;
  if (rule.with_gradient) {
    const double scale = logs ? 1.0 : slope_factor(mean + rule.eps, static_cast<double>(pairs));
    write_gradient(layer, chunks, scale, num_experts, grad_sums, grad_squares);
  }
  return logs ? mean : -std::log(mean + rule.eps);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> divergence_and_gradient(
    std::string_view op,
    const at::Tensor& sums,
    const at::Tensor& counts,
    const std::optional<at::Tensor>& squares,
    const Rule& rule) {
  check_memory(op, sums, counts, squares);
  const at::Tensor dense_sums = sums.contiguous();
  const at::Tensor dense_squares = squares.has_value() ? squares->contiguous() : at::Tensor();
  const at::Tensor dense_counts = counts.contiguous();
  const int64_t num_domains = sums.size(-2);
  const int64_t num_experts = sums.size(-1);
  at::Tensor loss = at::zeros(sums.sizes().slice(0, sums.dim() - 2), sums.options());
  const auto zeros_if = [&](bool wanted) {
    return wanted ? at::zeros(sums.sizes(), sums.options()) : at::empty({0}, sums.options());
  };
  at::Tensor grad_sums = zeros_if(rule.with_gradient);
  at::Tensor grad_squares = zeros_if(rule.with_gradient && squares.has_value());
  const double* squares_data = squares.has_value() ? dense_squares.const_data_ptr<double>() : nullptr;
  double* grad_squares_data = grad_squares.numel() > 0 ? grad_squares.mutable_data_ptr<double>() : nullptr;
  for (int64_t l = 0; l < loss.numel() && num_domains > 0; ++l) {
    const int64_t offset = l * num_domains * num_experts;
    const DomainMeans layer = domain_means(
        dense_sums.const_data_ptr<double>() + offset, squares_data == nullptr ? nullptr : squares_data + offset,
        dense_counts.const_data_ptr<double>() + l * num_domains, num_domains, num_experts);
    loss.mutable_data_ptr<double>()[l] = layer_loss(
        layer, rule, num_experts, rule.with_gradient ? grad_sums.mutable_data_ptr<double>() + offset : nullptr,
        grad_squares_data == nullptr ? nullptr : grad_squares_data + offset);
  }
  return {loss, grad_sums, grad_squares};
}

at::Tensor expert_divergence_cpu(
    const at::Tensor& sums,
    const at::Tensor& counts,
    double eps,
    std::string_view reduction,
    const std::optional<at::Tensor>& squares,
    std::string_view op) {
  const PairReduction parsed = check_expert_divergence(op, sums, counts, eps, reduction, squares);
  return std::get<0>(divergence_and_gradient(op, sums, counts, squares, {parsed, eps, squares.has_value(), false}));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> expert_divergence_with_gradient_cpu(
    const at::Tensor& sums,
    const at::Tensor& counts,
    double eps,
    std::string_view reduction,
    const std::optional<at::Tensor>& squares,
    std::string_view op) {
  const PairReduction parsed = check_expert_divergence(op, sums, counts, eps, reduction, squares);
  return divergence_and_gradient(op, sums, counts, squares, {parsed, eps, squares.has_value(), true});
}

} // namespace
} // namespace edl::cpu

TORCH_LIBRARY_IMPL(edl, CPU, m) {
  m.impl("expert_divergence", edl::cpu::expert_divergence_cpu);
  m.impl("_expert_divergence_with_gradient", edl::cpu::expert_divergence_with_gradient_cpu);
}
