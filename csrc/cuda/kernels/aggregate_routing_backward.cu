// aggregate_routing on CUDA, backward: grad_routing[t] = grad_sums[segment_ids[t]] through the score; one launch for up to
// 32 layers, one write, one read with scores.
#include "cuda/kernels/aggregate_routing.h"

#include "cuda/kernels/elements.cuh"
#include "cuda/kernels/routing_layers.cuh"
#include "cuda/kernels/score_rows.cuh"
#include "cuda/kernels/warps.cuh"

namespace edl::cuda {
namespace {

template <typename Storage>
struct GradientLayers {
  const Storage* routing[kMostLayers];
  int64_t row_stride[kMostLayers];
  Storage* grad_routing[kMostLayers];
};

// Of a launch; of a layer once `spread_rows` has looked it up.
template <typename Storage>
struct GradientProblem {
  const Accumulation<Storage>* grad_sums;
  Ids ids;
  const Storage* routing;
  int64_t row_stride;
  int64_t num_tokens;
  int64_t num_experts;
  int64_t num_segments;
  Scores scores;
  int lanes; // of a team
  Storage* grad_routing;
};

constexpr int kRowsPerTeam = 2;

// A tile of a row of grad_sums; 0 where the row has no segment and past the end.
template <typename Acc, int width, int packs>
__device__ inline void load_grad(
    const Acc* grad, int64_t num_experts, int64_t first_column, const Team& team, Acc (&g)[packs * width]) {
#pragma unroll
  for (int p = 0; p < packs; ++p) {
    const int64_t column = column_of<width>(team, first_column, p);
    Pack<Acc, width> pack = {};
    if (grad != nullptr && column < num_experts) {
      pack = load_pack<width>(grad + column);
    }
#pragma unroll
    for (int i = 0; i < width; ++i) {
      g[p * width + i] = pack.values[i];
    }
  }
}

template <typename Storage, int width, int packs, typename Acc = Accumulation<Storage>>
__device__ inline void store_tile(
    const Acc (&x)[packs * width], int64_t num_experts, int64_t first_column, const Team& team, Storage* row) {
#pragma unroll
  for (int p = 0; p < packs; ++p) {
    const int64_t column = column_of<width>(team, first_column, p);
    if (column < num_experts) {
      Pack<Storage, width> pack;
#pragma unroll
      for (int i = 0; i < width; ++i) {
        pack.values[i] = narrow<Storage>(x[p * width + i]);
      }
      store_pack<width>(pack, row + column);
    }
  }
}

// d/dz_i of Σ_j g_j q_j with q = score(z), s = unnormalised(z), q = s * factor:
// q_i (g_i - <g, q>) · d log s_i / dz_i.
template <typename Acc>
__device__ inline Acc through_score(Acc s, Acc factor, Acc g, Acc dot, Scores scores) {
  return s * factor * log_slope(s, scores) * (g - dot);
}

// One row, held whole by its team. g holds the gradient of the sums, and then of the logits.
template <typename Acc, int count>
__device__ inline void through_score_tile(Scores scores, int lanes, Acc (&z)[count], Acc (&g)[count]) {
  const Acc factor = score_tile(scores, lanes, z);
  Acc dot = 0;
#pragma unroll
  for (int c = 0; c < count; ++c) {
    dot += z[c] * g[c];
  }
  dot = team_sum(dot, lanes) * factor;
#pragma unroll
  for (int c = 0; c < count; ++c) {
    g[c] = through_score(z[c], factor, g[c], dot, scores);
  }
}

// One row of any length, by a warp, in three passes over it.
template <typename Storage, typename Acc = Accumulation<Storage>>
__device__ void spread_wide_row(const GradientProblem<Storage>& problem, int64_t t, const Acc* grad) {
  const int lane = threadIdx.x % kWarp;
  const Storage* row = problem.routing + t * problem.row_stride;
  Storage* out = problem.grad_routing + t * problem.num_experts;
  const RowStatistics<Acc> of_row = statistics_of_row(row, problem.num_experts, problem.scores);
  Acc dot = 0;
  for (int64_t e = lane; e < problem.num_experts; e += kWarp) {
    dot += unnormalised(static_cast<Acc>(widen(row[e])), problem.scores, of_row.highest) * grad[e];
  }
  dot = team_sum(dot, kWarp) * of_row.factor;
  for (int64_t e = lane; e < problem.num_experts; e += kWarp) {
    const Acc s = unnormalised(static_cast<Acc>(widen(row[e])), problem.scores, of_row.highest);
    out[e] = narrow<Storage>(through_score(s, of_row.factor, grad[e], dot, problem.scores));
  }
}

template <typename Storage, int width, int packs>
__global__ void __launch_bounds__(kThreads, 2)
    spread_rows(GradientProblem<Storage> problem, GradientLayers<Storage> layers) {
  using Acc = Accumulation<Storage>;
  constexpr int count = packs * width;
  const int layer = blockIdx.y;
  problem.routing = layers.routing[layer];
  problem.row_stride = layers.row_stride[layer];
  problem.grad_routing = layers.grad_routing[layer];
  problem.grad_sums += layer * problem.num_segments * problem.num_experts;
  const Team team = team_of_thread(problem.lanes);
  const int64_t tile_columns = static_cast<int64_t>(team.lanes) * count;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * team.teams * kRowsPerTeam;
#pragma unroll
  for (int r = 0; r < kRowsPerTeam; ++r) {
    const int64_t t = first_row + r * team.teams + team.index;
    const bool inside = t < problem.num_tokens;
    const int64_t segment = inside ? id_at(problem.ids, t) : -1;
    const bool wrong = segment < -1 || segment >= problem.num_segments;
    const bool counted = segment >= 0 && !wrong;
    const Acc* grad = counted ? problem.grad_sums + segment * problem.num_experts : nullptr;
    Storage* out = problem.grad_routing + t * problem.num_experts;
    if (problem.scores != Scores::none && tile_columns < problem.num_experts && counted) {
      spread_wide_row(problem, t, grad); // then a team is a warp, and takes the branch together
      continue;
    }
    for (int64_t first_column = 0; first_column < problem.num_experts; first_column += tile_columns) {
      Acc g[count];
      load_grad<Acc, width, packs>(grad, problem.num_experts, first_column, team, g);
      if (problem.scores != Scores::none && tile_columns >= problem.num_experts) {
        Pack<Storage, width> tile[packs] = {};
        if (inside) {
          load_tile<Storage, width, packs>(
              problem.routing + t * problem.row_stride, problem.num_experts, first_column, team, tile);
        }
        Acc z[count];
        widen_tile<Storage, width, packs>(tile, problem.num_experts, first_column, team, z);
        through_score_tile(problem.scores, team.lanes, z, g); // every lane takes part, also with no row
      }
      if (!counted) { // also where the logits of a row that is not counted are not finite
#pragma unroll
        for (int c = 0; c < count; ++c) {
          g[c] = wrong ? kNan<Acc> : Acc(0);
        }
      }
      if (inside) {
        store_tile<Storage, width, packs>(g, problem.num_experts, first_column, team, out);
      }
    }
  }
}

template <typename Storage>
void spread_layers(const AggregateRoutingGradient& gradient, int64_t first, int64_t count, cudaStream_t stream) {
  using Acc = Accumulation<Storage>;
  const Acc* grad_sums =
      static_cast<const Acc*>(gradient.grad_sums) + first * gradient.num_segments * gradient.num_experts;
  GradientLayers<Storage> layers = {};
  bool aligned = is_aligned_to_16(grad_sums);
  for (int64_t l = 0; l < count; ++l) {
    const RoutingLayer& layer = gradient.layers[first + l];
    layers.routing[l] = static_cast<const Storage*>(layer.routing);
    layers.row_stride[l] = layer.row_stride;
    layers.grad_routing[l] = static_cast<Storage*>(layer.grad_routing);
    aligned = aligned && is_aligned_to_16(layer.grad_routing) &&
        (gradient.scores == Scores::none || rows_are_aligned(layer.routing, layer.row_stride, gradient.storage));
  }
  GradientProblem<Storage> problem = {
      grad_sums,
      {gradient.segment_ids, gradient.ids_are_64_bit},
      nullptr,
      0,
      gradient.num_tokens,
      gradient.num_experts,
      gradient.num_segments,
      gradient.scores,
      0,
      nullptr};
  with_tile<Storage>(aligned, gradient.num_experts, [&]<int width, int packs>() {
    problem.lanes = lanes_for(gradient.num_experts, width, packs);
    const int64_t rows_per_block = static_cast<int64_t>(kThreads / problem.lanes) * kRowsPerTeam;
    const auto blocks = static_cast<unsigned>(divide_up(gradient.num_tokens, rows_per_block));
    EDL_LAUNCH(
        (spread_rows<Storage, width, packs>), dim3(blocks, static_cast<unsigned>(count)), kThreads, 0, stream, problem,
        layers);
  });
}

} // namespace

void launch_aggregate_routing_backward(const AggregateRoutingGradient& gradient, cudaStream_t stream) {
  in_groups(gradient.num_layers, kMostLayers, [&](int64_t first, int64_t count) {
    with_storage(gradient.storage, [&]<typename Storage>() { spread_layers<Storage>(gradient, first, count, stream); });
  });
}

} // namespace edl::cuda
