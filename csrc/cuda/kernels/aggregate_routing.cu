// aggregate_routing on CUDA: L times routing [T, E], segment_ids [T] → sums [L, S, E], counts [S], in two launches for
// up to 32 layers, or three where segments and layers are few.
//
// 1. `sum_chunks`: a block takes a chunk of 64 to 256 rows (by T alone) of a layer and sorts it stably by segment. A
//    group of at least 8 rows of one segment becomes one partial sum, in float32 (float64 for float64); smaller groups
//    are left.
// 2. `add_up_segments`: a block per segment and layer looks through the chunks in order and adds up, in float64, its
//    partial sums and the rows that were left. Where these blocks would leave most of a device idle, several share the
//    chunks of a segment, and
// 3. `add_up_parts` adds up their totals, in order.
// Chunks, groups, parts and orders depend on L, T, S, E and the ids alone, so the bits do not depend on the device. An
// id outside [-1, S) makes every sum and count NaN. Cost: one read of routing; runs of equal ids read T/chunk partial
// sums on top, and ids without any order read the rows in pass 2. Scratch: T (L E/8 + 2) numbers at most, of as many
// layers at once as keep it below 64 MiB, and 1 MiB for parts.
//
// Considered and left: a table [S, E] in shared memory per block (limits S·E, and its partial tables cost as much
// traffic as the input); a counting sort of all rows first (two more launches); float atomics (order changes from run
// to run).
#include "cuda/kernels/aggregate_routing.h"

#include "cuda/kernels/elements.cuh"
#include "cuda/kernels/routing_layers.cuh"
#include "cuda/kernels/score_rows.cuh"
#include "cuda/kernels/segment_chunks.cuh"
#include "cuda/kernels/warps.cuh"

namespace edl::cuda {
namespace {

// ---- pass 1 ----

// Adds rows order[begin..end) of a chunk (pass 2: of a list), columns of one tile, to the lane's totals. Rows are dealt
// to the teams in turn; each has `at_once` of them in flight. `statistics`: of every row of the chunk, where a tile
// does not hold a whole row; else null.
template <
    typename Storage,
    int width,
    int packs,
    int at_once,
    typename Index,
    typename Total,
    typename Acc = Accumulation<Storage>>
__device__ void add_rows(
    const SumProblem<Storage>& problem,
    int64_t first_row,
    const Index* order,
    int begin,
    int end,
    int64_t first_column,
    const Team& team,
    const RowStatistics<Acc>* statistics,
    Total (&total)[packs * width]) {
  constexpr int count = packs * width;
  for (int i = begin; i < end; i += at_once * team.teams) {
    Pack<Storage, width> tiles[at_once][packs] = {};
    int rows[at_once];
#pragma unroll
    for (int r = 0; r < at_once; ++r) {
      const int at = i + r * team.teams + team.index;
      rows[r] = at < end ? static_cast<int>(order[at]) : -1;
      if (rows[r] >= 0) {
        const Storage* row = problem.routing + (first_row + rows[r]) * problem.row_stride;
        load_tile<Storage, width, packs>(row, problem.num_experts, first_column, team, tiles[r]);
      }
    }
#pragma unroll
    for (int r = 0; r < at_once; ++r) {
      Acc x[count];
      widen_tile<Storage, width, packs>(tiles[r], problem.num_experts, first_column, team, x);
      Acc factor = 1;
      if (problem.scores != Scores::none) {
        if (statistics == nullptr) {
          factor = score_tile(problem.scores, team.lanes, x); // every lane takes part, also with no row
        } else if (rows[r] >= 0) {
          const RowStatistics<Acc> of_row = statistics[rows[r]];
          factor = of_row.factor;
#pragma unroll
          for (int c = 0; c < count; ++c) {
            x[c] = unnormalised(x[c], problem.scores, of_row.highest);
          }
        }
      }
      if (rows[r] >= 0) {
#pragma unroll
        for (int c = 0; c < count; ++c) {
          total[c] += static_cast<Total>(x[c] * factor);
        }
      }
    }
  }
}

// Adds up the teams' totals, in a warp and then warp after warp, and hands each column's to `write(column, sum)`. All
// threads call.
template <int width, int packs, typename Total, typename Write>
__device__ void add_teams(
    Total (&total)[packs * width],
    Total* shared, // [warps, kWarp * width * packs]
    int64_t num_experts,
    int64_t first_column,
    const Team& team,
    const Write& write) {
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int tile_columns = team.lanes * width * packs;
  __syncthreads(); // shared may still be read from the last call
#pragma unroll
  for (int p = 0; p < packs; ++p) {
#pragma unroll
    for (int i = 0; i < width; ++i) {
      Total x = total[p * width + i];
      for (int step = team.lanes; step < kWarp; step *= 2) {
        x += __shfl_xor_sync(kAllLanes, x, step);
      }
      if (lane < team.lanes) {
        shared[warp * tile_columns + column_of<width>(team, 0, p) + i] = x;
      }
    }
  }
  __syncthreads();
  for (int c = threadIdx.x; c < tile_columns && first_column + c < num_experts; c += kThreads) {
    Total sum = 0;
    for (int w = 0; w < kThreads / kWarp; ++w) {
      sum += shared[w * tile_columns + c];
    }
    write(first_column + c, sum);
  }
}

template <typename Storage, int width, int packs>
__global__ void __launch_bounds__(kThreads, 2) sum_chunks(SumProblem<Storage> problem, SumLayers<Storage> layers) {
  using Acc = Accumulation<Storage>;
  __shared__ SortedChunk chunk;
  __shared__ Acc sums[kThreads * width * packs];
  __shared__ RowStatistics<Acc> statistics[kMostRows];
  of_layer(layers, blockIdx.y, &problem);
  const int64_t chunk_index = blockIdx.x;
  const int64_t first_row = chunk_index * problem.chunk_rows;
  const int64_t rows_left = problem.num_tokens - first_row;
  const int rows = rows_left < problem.chunk_rows ? static_cast<int>(rows_left) : problem.chunk_rows;
  sort_chunk(problem, first_row, rows, &chunk);
  if (blockIdx.y == 0) { // all layers have the same
    write_index(problem, chunk_index, chunk);
  }

  const Team team = team_of_thread(problem.lanes);
  const int64_t tile_columns = static_cast<int64_t>(team.lanes) * width * packs;
  const bool wide = problem.scores != Scores::none && tile_columns < problem.num_experts;
  if (wide) { // then a team is a warp
    for (int r = team.index; r < rows; r += team.teams) {
      const RowStatistics<Acc> of_row = statistics_of_row(
          problem.routing + (first_row + r) * problem.row_stride, problem.num_experts, problem.scores);
      if (team.lane == 0) {
        statistics[r] = of_row;
      }
    }
    __syncthreads();
  }
  const int slots = problem.chunk_rows / kLongGroup;
  for (int slot = 0; slot < slots; ++slot) {
    const int begin = chunk.long_begin[slot];
    if (begin < 0) {
      continue;
    }
    const int end = end_of_group(chunk.sorted, begin, chunk.valid);
    Acc* partial = problem.scratch.partial + (chunk_index * slots + slot) * problem.num_experts;
    for (int64_t first_column = 0; first_column < problem.num_experts; first_column += tile_columns) {
      Acc total[packs * width] = {};
      constexpr int in_flight = 128 / (width * packs * static_cast<int>(sizeof(Storage)));
      constexpr int at_once = in_flight < 4 ? in_flight : 4;
      add_rows<Storage, width, packs, at_once>(
          problem, first_row, chunk.order, begin, end, first_column, team, wide ? statistics : nullptr, total);
      add_teams<width, packs>(total, sums, problem.num_experts, first_column, team, [&](int64_t column, Acc sum) {
        partial[column] = sum;
      });
    }
  }
}

// ---- pass 2 ----

// Adds partial sums list[0..count) to the lane's totals.
template <typename Storage, int width, int packs>
__device__ void add_partials(
    const SumProblem<Storage>& problem,
    int64_t first_slot,
    const uint16_t* list,
    int count,
    int64_t first_column,
    const Team& team,
    double (&total)[packs * width]) {
  using Acc = Accumulation<Storage>;
  for (int i = team.index; i < count; i += team.teams) {
    const Acc* partial = problem.scratch.partial + (first_slot + list[i]) * problem.num_experts;
    Pack<Acc, width> tile[packs] = {};
    load_tile<Acc, width, packs>(partial, problem.num_experts, first_column, team, tile);
#pragma unroll
    for (int p = 0; p < packs; ++p) {
      if (column_of<width>(team, first_column, p) < problem.num_experts) {
#pragma unroll
        for (int c = 0; c < width; ++c) {
          total[p * width + c] += static_cast<double>(tile[p].values[c]);
        }
      }
    }
  }
}

// Adds rows list[0..count), which need their statistics first where a tile does not hold a whole row.
template <typename Storage, int width, int packs>
__device__ void add_left_rows(
    const SumProblem<Storage>& problem,
    int64_t first_row,
    const uint16_t* list,
    int count,
    int64_t first_column,
    const Team& team,
    bool wide,
    double (&total)[packs * width]) {
  using Acc = Accumulation<Storage>;
  if (!wide) {
    add_rows<Storage, width, packs, 2>(
        problem, first_row, list, 0, count, first_column, team, static_cast<const RowStatistics<Acc>*>(nullptr), total);
    return;
  }
  for (int i = team.index; i < count; i += team.teams) { // a team is a warp
    const Storage* row = problem.routing + (first_row + list[i]) * problem.row_stride;
    const RowStatistics<Acc> of_row = statistics_of_row(row, problem.num_experts, problem.scores);
    Pack<Storage, width> tile[packs] = {};
    Acc x[packs * width];
    load_tile<Storage, width, packs>(row, problem.num_experts, first_column, team, tile);
    widen_tile<Storage, width, packs>(tile, problem.num_experts, first_column, team, x);
#pragma unroll
    for (int c = 0; c < packs * width; ++c) {
      total[c] += static_cast<double>(unnormalised(x[c], problem.scores, of_row.highest) * of_row.factor);
    }
  }
}

template <typename Storage, int width, int packs>
__global__ void __launch_bounds__(kThreads, 2) add_up_segments(SumProblem<Storage> problem, SumLayers<Storage> layers) {
  using Acc = Accumulation<Storage>;
  __shared__ GroupList list;
  __shared__ double sums[kThreads * width * packs];
  of_layer(layers, blockIdx.z, &problem);
  const auto parts = static_cast<unsigned>(problem.parts.count);
  const auto segment = static_cast<int32_t>(blockIdx.x / parts);
  const int64_t part = blockIdx.x % parts;
  const Team team = team_of_thread(problem.lanes);
  const int64_t tile_columns = static_cast<int64_t>(team.lanes) * width * packs;
  const int64_t first_column = blockIdx.y * tile_columns;
  const bool wide = problem.scores != Scores::none && tile_columns < problem.num_experts;
  const int64_t chunks = divide_up(problem.num_tokens, problem.chunk_rows);
  const int64_t chunks_of_part = divide_up(chunks, problem.parts.count);
  const int64_t end = (part + 1) * chunks_of_part < chunks ? (part + 1) * chunks_of_part : chunks;
  const int slots_per_chunk = problem.chunk_rows / kLongGroup;

  double total[packs * width] = {};
  bool wrong = false;
  int64_t tokens = 0;
  for (int64_t first_chunk = part * chunks_of_part; first_chunk < end; first_chunk += kThreads) {
    const int64_t chunk_index = first_chunk + threadIdx.x;
    Group group = {0, 0};
    if (chunk_index < end) {
      const ChunkHeader header = problem.scratch.headers[chunk_index];
      wrong |= header.valid < 0;
      if (header.valid > 0) {
        group = find_group(header, problem.scratch.sorted + chunk_index * problem.chunk_rows, segment);
      }
    }
    tokens += group.count;
    if (!__syncthreads_or(group.count > 0)) {
      continue;
    }
    const GroupCounts counts = list_groups(problem, chunk_index, group, &list);
    add_partials<Storage, width, packs>(
        problem, first_chunk * slots_per_chunk, list.slots, counts.slots, first_column, team, total);
    add_left_rows<Storage, width, packs>(
        problem, first_chunk * problem.chunk_rows, list.rows, counts.rows, first_column, team, wide, total);
    __syncthreads(); // the list is read until here
  }
  const bool any_wrong = __syncthreads_or(wrong);
  Acc* out = problem.sums + segment * problem.num_experts;
  double* out_of_part =
      problem.parts.totals + (static_cast<int64_t>(blockIdx.z) * gridDim.x + blockIdx.x) * problem.num_experts;
  add_teams<width, packs>(total, sums, problem.num_experts, first_column, team, [&](int64_t column, double sum) {
    if (parts > 1) {
      out_of_part[column] = sum;
    } else {
      out[column] = any_wrong ? kNan<Acc> : static_cast<Acc>(sum);
    }
  });
  __shared__ int64_t token_sums[kThreads / kWarp];
  const int64_t all_tokens = block_sum(tokens, token_sums);
  if (threadIdx.x == 0 && blockIdx.y == 0 && blockIdx.z == 0) { // all tiles and layers have the same
    if (parts > 1) {
      problem.parts.tokens[blockIdx.x] = any_wrong ? -1 : all_tokens;
    } else {
      problem.counts[segment] = any_wrong ? kNan<Acc> : static_cast<Acc>(all_tokens);
    }
  }
}

// ---- pass 3 ----

// A thread per sum of a layer.
template <typename Storage>
__global__ void __launch_bounds__(kThreads) add_up_parts(SumProblem<Storage> problem) {
  using Acc = Accumulation<Storage>;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= problem.num_segments * problem.num_experts) {
    return;
  }
  const int64_t segment = i / problem.num_experts;
  const int64_t column = i % problem.num_experts;
  const int64_t first_part = segment * problem.parts.count;
  const int64_t row = blockIdx.y * problem.num_segments * problem.parts.count + first_part;
  double sum = 0;
  int64_t tokens = 0;
  bool wrong = false;
#pragma unroll 4
  for (int part = 0; part < problem.parts.count; ++part) {
    const int64_t of_part = problem.parts.tokens[first_part + part];
    wrong |= of_part < 0;
    tokens += of_part;
    sum += problem.parts.totals[(row + part) * problem.num_experts + column];
  }
  problem.sums[blockIdx.y * problem.num_segments * problem.num_experts + i] = wrong ? kNan<Acc> : static_cast<Acc>(sum);
  if (column == 0 && blockIdx.y == 0) {
    problem.counts[segment] = wrong ? kNan<Acc> : static_cast<Acc>(tokens);
  }
}

// ---- launches ----

template <typename Storage>
void aggregate_layers(
    const AggregateRoutingTask& task, int64_t first, int64_t count, const ScratchLayout& layout, cudaStream_t stream) {
  using Acc = Accumulation<Storage>;
  char* scratch = static_cast<char*>(task.scratch);
  SumLayers<Storage> layers = {};
  bool aligned = true;
  for (int64_t l = 0; l < count; ++l) {
    const RoutingLayer& layer = task.layers[first + l];
    layers.routing[l] = static_cast<const Storage*>(layer.routing);
    layers.row_stride[l] = layer.row_stride;
    aligned = aligned && rows_are_aligned(layer.routing, layer.row_stride, task.storage);
  }
  SumProblem<Storage> problem = {
      nullptr,
      0,
      {task.segment_ids, task.ids_are_64_bit},
      task.num_tokens,
      task.num_experts,
      task.num_segments,
      task.scores,
      chunk_rows_for(task.num_tokens),
      0,
      {reinterpret_cast<ChunkHeader*>(scratch), reinterpret_cast<int32_t*>(scratch + layout.sorted),
       reinterpret_cast<uint8_t*>(scratch + layout.order), reinterpret_cast<Acc*>(scratch + layout.partial)},
      static_cast<Acc*>(task.sums) + first * task.num_segments * task.num_experts,
      static_cast<Acc*>(task.counts),
      {static_cast<int>(layout.parts), reinterpret_cast<double*>(scratch + layout.totals),
       reinterpret_cast<int64_t*>(scratch + layout.tokens)}};
  with_tile<Storage>(aligned, task.num_experts, [&]<int width, int packs>() {
    problem.lanes = lanes_for(task.num_experts, width, packs);
    const auto chunks = static_cast<unsigned>(divide_up(task.num_tokens, problem.chunk_rows));
    const int64_t tiles = divide_up(task.num_experts, static_cast<int64_t>(problem.lanes) * width * packs);
    const auto z = static_cast<unsigned>(count);
    const dim3 segments(static_cast<unsigned>(task.num_segments * layout.parts), static_cast<unsigned>(tiles), z);
    EDL_LAUNCH((sum_chunks<Storage, width, packs>), dim3(chunks, z), kThreads, 0, stream, problem, layers);
    EDL_LAUNCH((add_up_segments<Storage, width, packs>), segments, kThreads, 0, stream, problem, layers);
    if (layout.parts > 1) {
      const auto blocks = static_cast<unsigned>(divide_up(task.num_segments * task.num_experts, kThreads));
      EDL_LAUNCH((add_up_parts<Storage>), dim3(blocks, z), kThreads, 0, stream, problem);
    }
  });
}

} // namespace

int64_t aggregate_routing_scratch_bytes(
    int64_t num_tokens, int64_t num_experts, int64_t num_segments, int64_t num_layers, StorageType storage) {
  return ScratchLayout(num_tokens, num_experts, num_segments, num_layers, accumulation_size_of(storage)).bytes;
}

void launch_aggregate_routing(const AggregateRoutingTask& task, cudaStream_t stream) {
  const ScratchLayout layout(
      task.num_tokens, task.num_experts, task.num_segments, task.num_layers, accumulation_size_of(task.storage));
  in_groups(task.num_layers, layout.layers, [&](int64_t first, int64_t count) {
    with_storage(
        task.storage, [&]<typename Storage>() { aggregate_layers<Storage>(task, first, count, layout, stream); });
  });
}

} // namespace edl::cuda
