#pragma once

// Rows of a matrix [*, E] across the lanes of a team, and the score of a row: logits → distribution over experts.

#include <utility>

#include "common/score_function.h"
#include "cuda/kernels/elements.cuh"
#include "cuda/kernels/warps.cuh"

namespace edl::cuda {

// A tile is a range of columns that a team holds at once: `packs` packs of `width` elements per lane, so lanes * packs
// * width columns. Pack p of a lane starts at column first + (p * lanes + lane) * width; E is a multiple of the width.
struct Team {
  int lanes; // a power of two, at most 32
  int lane;
  int index; // of the team in its block
  int teams; // in the block
};

__device__ inline Team team_of_thread(int lanes) {
  return {
      lanes, static_cast<int>(threadIdx.x) % lanes, static_cast<int>(threadIdx.x) / lanes,
      static_cast<int>(blockDim.x) / lanes};
}

// The fewest lanes (a power of two) whose packs cover a row, at most a warp.
inline int lanes_for(int64_t num_experts, int width, int packs) {
  int lanes = 1;
  while (lanes < kWarp && static_cast<int64_t>(lanes) * width * packs < num_experts) {
    lanes *= 2;
  }
  return lanes;
}

template <int width>
__device__ inline int64_t column_of(const Team& team, int64_t first_column, int pack) {
  return first_column + (static_cast<int64_t>(pack) * team.lanes + team.lane) * width;
}

template <typename Storage, int width, int packs>
__device__ inline void load_tile(
    const Storage* row,
    int64_t num_experts,
    int64_t first_column,
    const Team& team,
    Pack<Storage, width> (&tile)[packs]) {
#pragma unroll
  for (int p = 0; p < packs; ++p) {
    const int64_t column = column_of<width>(team, first_column, p);
    if (column < num_experts) {
      tile[p] = load_pack<width>(row + column);
    }
  }
}

// Columns past the end become minus infinity, which every score maps to 0.
template <typename Storage, int width, int packs, typename Acc = Accumulation<Storage>>
__device__ inline void widen_tile(
    const Pack<Storage, width> (&tile)[packs],
    int64_t num_experts,
    int64_t first_column,
    const Team& team,
    Acc (&x)[packs * width]) {
#pragma unroll
  for (int p = 0; p < packs; ++p) {
    const bool inside = column_of<width>(team, first_column, p) < num_experts;
#pragma unroll
    for (int i = 0; i < width; ++i) {
      x[p * width + i] = inside ? widen(tile[p].values[i]) : -kInfinity<Acc>;
    }
  }
}

__device__ inline float exponential(float x) {
  return expf(x);
}
__device__ inline double exponential(double x) {
  return exp(x);
}

template <typename Acc>
__device__ inline Acc sigmoid(Acc z) {
  const Acc decay = exponential(z < 0 ? z : -z); // exp(-|z|): no overflow on either side
  return (z < 0 ? decay : Acc(1)) / (1 + decay);
}

// ---- the formula of every score function ----

template <typename Acc>
__device__ inline Acc unnormalised(Acc z, Scores scores, Acc highest) {
  return scores == Scores::softmax ? exponential(z - highest) : sigmoid(z);
}

// d log s / dz of s = unnormalised(z).
template <typename Acc>
__device__ inline Acc log_slope(Acc s, Scores scores) {
  return scores == Scores::sigmoid ? 1 - s : Acc(1);
}

// ---- rows ----

// score(z) = unnormalised(z) * factor.
template <typename Acc>
struct RowStatistics {
  Acc highest; // the largest logit
  Acc factor; //  one over the sum of the unnormalised scores
};

template <typename Acc>
__device__ inline Acc factor_of(Acc sum, Scores scores) {
  return 1 / (is_share_of_row(scores) ? sum : sum + static_cast<Acc>(kScoreSumEpsilon));
}

template <typename Acc, int count>
__device__ inline Acc highest_of(const Acc (&x)[count]) {
  Acc highest = x[0];
#pragma unroll
  for (int i = 1; i < count; ++i) {
    highest = x[i] > highest || highest != highest ? x[i] : highest;
  }
  return highest;
}

// A row that the team holds whole: x becomes the unnormalised scores; returns their factor. The warp's 32 lanes call.
template <typename Acc, int count>
__device__ inline Acc score_tile(Scores scores, int lanes, Acc (&x)[count]) {
  const Acc highest = team_max(highest_of(x), lanes);
  Acc sum = 0;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    x[i] = unnormalised(x[i], scores, highest);
    sum += x[i];
  }
  const Acc factor = factor_of(team_sum(sum, lanes), scores);
  return highest == -kInfinity<Acc> ? kNan<Acc> : factor; // a row that is masked wholly has no distribution
}

// The same for a row of any length, by a whole warp, from memory, or what reads it as `row[e]`: two passes over it.
template <typename Row, typename Acc = decltype(widen(std::declval<Row>()[0]))>
__device__ inline RowStatistics<Acc> statistics_of_row(const Row& row, int64_t num_experts, Scores scores) {
  const int lane = threadIdx.x % kWarp;
  Acc highest = -kInfinity<Acc>;
  for (int64_t e = lane; e < num_experts; e += kWarp) {
    const Acc z = widen(row[e]);
    highest = z > highest ? z : highest;
  }
  highest = team_max(highest, kWarp);
  Acc sum = 0;
  for (int64_t e = lane; e < num_experts; e += kWarp) {
    sum += unnormalised(static_cast<Acc>(widen(row[e])), scores, highest);
  }
  const Acc factor = factor_of(team_sum(sum, kWarp), scores);
  return {highest, highest == -kInfinity<Acc> ? kNan<Acc> : factor};
}

} // namespace edl::cuda
