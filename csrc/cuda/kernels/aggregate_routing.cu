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
//
// Backward: grad_routing[t] = grad_sums[segment_ids[t]] through the score; one launch for up to 32 layers, one write,
// one read with scores.
#include "cuda/kernels/aggregate_routing.h"

#include "cuda/kernels/elements.cuh"
#include "cuda/kernels/score_rows.cuh"
#include "cuda/kernels/warps.cuh"

namespace edl::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMostRows = 256; //  of a chunk; a thread each
constexpr int kLongGroup = 8; //   rows from which a group is summed in the first pass
constexpr int kMostSlots = kMostRows / kLongGroup;
constexpr int32_t kNoSegment = 0x7fffffff;
constexpr int kMostLayers = 32; // of a launch
constexpr int64_t kMostScratchBytes = int64_t{64} << 20; // of more than one layer
constexpr int64_t kManyBlocks = 264; //  of the second pass: two for each of 132 multiprocessors
constexpr int64_t kManyChunks = 128; //  fewer are looked through sooner than parts are added up
constexpr int64_t kFewestChunks = 32; // of a part
constexpr int64_t kMostParts = 32; //    of a segment
constexpr int64_t kWidestTile = 512; //  columns
static_assert(kThreads == kMostRows);

// Fewer rows for few tokens, so that there are enough blocks.
int chunk_rows_for(int64_t num_tokens) {
  return num_tokens <= 16384 ? 64 : num_tokens <= 65536 ? 128 : 256;
}

// Blocks that share a segment of a layer in the second pass.
int64_t parts_for(int64_t chunks, int64_t num_segments, int64_t num_experts, int64_t num_layers) {
  const int64_t by_blocks = kManyBlocks / (num_segments * num_layers * divide_up(num_experts, kWidestTile));
  if (chunks < kManyChunks || by_blocks < 2) {
    return 1;
  }
  const int64_t by_chunks = chunks / kFewestChunks < kMostParts ? chunks / kFewestChunks : kMostParts;
  return by_blocks < by_chunks ? by_blocks : by_chunks;
}

// What the second pass needs to know of a chunk. Of rows sorted by segment, `valid` have one.
struct alignas(16) ChunkHeader {
  int32_t first; //            segment of the first row and
  int32_t last; //             of the last: no other is outside; first > last: none
  int16_t end_of_first; //     rows of the first segment
  int16_t begin_of_last; //    where the last segment begins
  int32_t valid; //            rows with a segment; -1: an id is outside [-1, S)
};

// Where pass 1 leaves its results. A long group that begins at sorted row b of its chunk has slot b / kLongGroup.
template <typename Acc>
struct Scratch {
  ChunkHeader* headers; // [chunks]
  int32_t* sorted; //      [chunks, chunk_rows] segments, where a chunk has several
  uint8_t* order; //       [chunks, chunk_rows] the row of the chunk at that place, where rows will be read again
  Acc* partial; //         [layers, chunks, chunk_rows / kLongGroup, E]
};

// Where pass 2 leaves its results where blocks share a segment.
struct Parts {
  int count; //       of a segment
  double* totals; //  [layers, S, count, E]
  int64_t* tokens; // [S, count]; -1: an id is outside [-1, S)
};

int64_t round_up_to_16(int64_t bytes) {
  return divide_up(bytes, 16) * 16;
}

struct ScratchLayout {
  ScratchLayout(
      int64_t num_tokens, int64_t num_experts, int64_t num_segments, int64_t num_layers, int64_t accumulation_size) {
    const int64_t rows = chunk_rows_for(num_tokens);
    const int64_t chunks = divide_up(num_tokens, rows);
    sorted = chunks * static_cast<int64_t>(sizeof(ChunkHeader));
    order = sorted + round_up_to_16(chunks * rows * static_cast<int64_t>(sizeof(int32_t)));
    partial = order + round_up_to_16(chunks * rows);
    const int64_t bytes_of_layer = chunks * (rows / kLongGroup) * num_experts * accumulation_size;
    const int64_t fitting = bytes_of_layer == 0 ? num_layers : kMostScratchBytes / bytes_of_layer;
    layers = fitting < 1 ? 1 : fitting < kMostLayers ? fitting : kMostLayers;
    layers = layers < num_layers ? layers : num_layers;
    parts = parts_for(chunks, num_segments, num_experts, layers);
    const int64_t shared = parts > 1 ? num_segments * parts : 0;
    totals = partial + layers * bytes_of_layer; // a multiple of 16, for a chunk has 8 slots or more
    tokens = totals + layers * shared * num_experts * static_cast<int64_t>(sizeof(double));
    bytes = tokens + shared * static_cast<int64_t>(sizeof(int64_t));
  }
  int64_t sorted, order, partial, totals, tokens, bytes; // offsets
  int64_t layers; //                                        at once
  int64_t parts;
};

template <typename Storage>
struct Layers {
  const Storage* routing[kMostLayers];
  int64_t row_stride[kMostLayers];
};

// Of a launch; of a layer once `of_layer` has looked it up.
template <typename Storage>
struct Problem {
  const Storage* routing;
  int64_t row_stride;
  Ids ids;
  int64_t num_tokens;
  int64_t num_experts;
  int64_t num_segments;
  Scores scores;
  int chunk_rows;
  int lanes; // of a team
  Scratch<Accumulation<Storage>> scratch;
  Accumulation<Storage>* sums;
  Accumulation<Storage>* counts;
  Parts parts;
};

template <typename Storage>
__device__ inline void of_layer(const Layers<Storage>& layers, int layer, Problem<Storage>* problem) {
  problem->routing = layers.routing[layer];
  problem->row_stride = layers.row_stride[layer];
  const int64_t chunks = divide_up(problem->num_tokens, problem->chunk_rows);
  problem->scratch.partial += layer * chunks * (problem->chunk_rows / kLongGroup) * problem->num_experts;
  problem->sums += layer * problem->num_segments * problem->num_experts;
}

// ---- pass 1 ----

struct SortedChunk {
  int32_t keys[kMostRows]; //     segments in the order of the rows
  int32_t sorted[kMostRows]; //   segments in order, rows without one last
  uint8_t order[kMostRows];
  int long_begin[kMostSlots]; //  where the long group of a slot begins, or -1
  int valid;
  bool wrong;
};

// The block's threads sort the chunk and find its long groups. Each thread has one row; ranks are counted, and only
// where the rows are not in order already.
template <typename Storage>
__device__ void sort_chunk(const Problem<Storage>& problem, int64_t first_row, int rows, SortedChunk* chunk) {
  const int i = threadIdx.x;
  int32_t key = kNoSegment;
  bool wrong = false;
  if (i < rows) {
    const int64_t id = id_at(problem.ids, first_row + i);
    wrong = id < -1 || id >= problem.num_segments;
    key = id < 0 || wrong ? kNoSegment : static_cast<int32_t>(id);
    chunk->keys[i] = key;
  }
  const bool any_wrong = __syncthreads_or(wrong);
  const int valid = __syncthreads_count(key != kNoSegment);
  const bool descends = i > 0 && i < rows && chunk->keys[i - 1] > key;
  const bool unsorted = __syncthreads_or(descends);
  int rank = i;
  if (unsorted) {
    rank = 0;
    for (int j = 0; j < rows; ++j) {
      rank += chunk->keys[j] < key || (chunk->keys[j] == key && j < i);
    }
  }
  if (i < rows) {
    chunk->sorted[rank] = key;
    chunk->order[rank] = static_cast<uint8_t>(i);
  }
  if (i < kMostSlots) {
    chunk->long_begin[i] = -1;
  }
  if (i == 0) {
    chunk->valid = valid;
    chunk->wrong = any_wrong;
  }
  __syncthreads();
  const bool begins = i < valid && (i == 0 || chunk->sorted[i - 1] != chunk->sorted[i]);
  if (begins && i + kLongGroup <= valid && chunk->sorted[i + kLongGroup - 1] == chunk->sorted[i]) {
    chunk->long_begin[i / kLongGroup] = i;
  }
  __syncthreads();
}

// The first row after `begin` of another segment.
__device__ inline int end_of_group(const int32_t* sorted, int begin, int valid) {
  const int32_t segment = sorted[begin];
  if (sorted[valid - 1] == segment) {
    return valid;
  }
  int low = begin + 1; // in [low, high] the answer
  int high = valid - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (sorted[middle] == segment) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Leaves for pass 2 what it needs to find this chunk's groups.
template <typename Storage>
__device__ void write_index(const Problem<Storage>& problem, int64_t chunk_index, const SortedChunk& chunk) {
  const int i = threadIdx.x;
  const int valid = chunk.valid;
  const int32_t first = valid > 0 ? chunk.sorted[0] : 1;
  const int32_t last = valid > 0 ? chunk.sorted[valid - 1] : 0;
  const bool counted = i < valid;
  const int of_first = __syncthreads_count(counted && chunk.sorted[i] == first);
  const int of_last = __syncthreads_count(counted && chunk.sorted[i] == last);
  if (i == 0) {
    problem.scratch.headers[chunk_index] = {
        first, last, static_cast<int16_t>(of_first), static_cast<int16_t>(valid - of_last), chunk.wrong ? -1 : valid};
  }
  if (counted && (first != last || valid < kLongGroup)) {
    const int64_t at = chunk_index * problem.chunk_rows + i;
    problem.scratch.sorted[at] = chunk.sorted[i];
    problem.scratch.order[at] = chunk.order[i];
  }
}

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
    const Problem<Storage>& problem,
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
__global__ void __launch_bounds__(kThreads, 2) sum_chunks(Problem<Storage> problem, Layers<Storage> layers) {
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

// A segment's rows in one chunk: sorted rows [begin, begin + count).
struct Group {
  int begin;
  int count;
};

__device__ inline int lower_bound(const int32_t* sorted, int length, int32_t segment) {
  int low = 0;
  int high = length;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (sorted[middle] < segment) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

__device__ inline Group find_group(const ChunkHeader& header, const int32_t* sorted, int32_t segment) {
  if (segment < header.first || segment > header.last) {
    return {0, 0};
  }
  if (segment == header.first) {
    return {0, header.end_of_first};
  }
  if (segment == header.last) {
    return {header.begin_of_last, header.valid - header.begin_of_last};
  }
  const int begin = lower_bound(sorted, header.valid, segment);
  return {begin, lower_bound(sorted, header.valid, segment + 1) - begin};
}

// The groups of one segment in kThreads chunks, in the order of the chunks. Numbers are relative to the first chunk, so
// that 16 bits hold them.
struct GroupList {
  uint16_t slots[kThreads]; //                    long groups: their slot
  uint16_t rows[kThreads * (kLongGroup - 1)]; //  short groups: their rows
  int scratch[kThreads / kWarp];
};
static_assert(kThreads * kMostSlots <= 65536 && kThreads * kMostRows <= 65536);

struct GroupCounts {
  int slots;
  int rows;
};

template <typename Storage>
__device__ GroupCounts
list_groups(const Problem<Storage>& problem, int64_t chunk_index, const Group& group, GroupList* list) {
  const int slots_per_chunk = problem.chunk_rows / kLongGroup;
  const bool is_long = group.count >= kLongGroup;
  const int few = is_long ? 0 : group.count;
  int total;
  const int before = block_exclusive_sum((is_long ? 1 << 16 : 0) + few, list->scratch, &total);
  const int relative_chunk = threadIdx.x;
  if (is_long) {
    list->slots[before >> 16] = static_cast<uint16_t>(relative_chunk * slots_per_chunk + group.begin / kLongGroup);
  }
  for (int i = 0; i < few; ++i) {
    const int row = problem.scratch.order[chunk_index * problem.chunk_rows + group.begin + i];
    list->rows[(before & 0xffff) + i] = static_cast<uint16_t>(relative_chunk * problem.chunk_rows + row);
  }
  __syncthreads();
  return {total >> 16, total & 0xffff};
}

// Adds partial sums list[0..count) to the lane's totals.
template <typename Storage, int width, int packs>
__device__ void add_partials(
    const Problem<Storage>& problem,
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
    const Problem<Storage>& problem,
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
__global__ void __launch_bounds__(kThreads, 2) add_up_segments(Problem<Storage> problem, Layers<Storage> layers) {
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
__global__ void __launch_bounds__(kThreads) add_up_parts(Problem<Storage> problem) {
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

// ---- backward ----

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

// d/dz_i of Σ_j g_j q_j with q = score(z), s = unnormalised(z), q = s * factor: softmax q_i (g_i - <g, q>), sigmoid
// q_i (1 - s_i) (g_i - <g, q>).
template <typename Acc>
__device__ inline Acc through_score(Acc s, Acc factor, Acc g, Acc dot, Scores scores) {
  return s * factor * (scores == Scores::sigmoid ? 1 - s : Acc(1)) * (g - dot);
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

// ---- launches ----

// Calls `function.template operator()<width, packs>()`: a lane holds 16 columns of a row in packs of 16 bytes where
// length and alignment allow it, so a team of 8 lanes holds 128 columns. float64 is for checking and has one form.
template <typename Storage, typename Function>
void with_tile(bool aligned, int64_t num_experts, const Function& function) {
  constexpr int width = kPackWidth<Storage>;
  if constexpr (sizeof(Storage) < 8) {
    if (aligned && num_experts % width == 0) {
      return function.template operator()<width, 16 / width>();
    }
  }
  return function.template operator()<1, 4>();
}

bool rows_are_aligned(const void* data, int64_t row_stride, StorageType storage) {
  return is_aligned_to_16(data) && row_stride * size_of(storage) % 16 == 0;
}

// Calls `function(first, count)` for all layers, at most `at_once` of them each time.
template <typename Function>
void in_groups(int64_t num_layers, int64_t at_once, const Function& function) {
  for (int64_t first = 0; first < num_layers; first += at_once) {
    function(first, num_layers - first < at_once ? num_layers - first : at_once);
  }
}

template <typename Storage>
void aggregate_layers(
    const AggregateRoutingTask& task, int64_t first, int64_t count, const ScratchLayout& layout, cudaStream_t stream) {
  using Acc = Accumulation<Storage>;
  char* scratch = static_cast<char*>(task.scratch);
  Layers<Storage> layers = {};
  bool aligned = true;
  for (int64_t l = 0; l < count; ++l) {
    const RoutingLayer& layer = task.layers[first + l];
    layers.routing[l] = static_cast<const Storage*>(layer.routing);
    layers.row_stride[l] = layer.row_stride;
    aligned = aligned && rows_are_aligned(layer.routing, layer.row_stride, task.storage);
  }
  Problem<Storage> problem = {
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

void launch_aggregate_routing_backward(const AggregateRoutingGradient& gradient, cudaStream_t stream) {
  in_groups(gradient.num_layers, kMostLayers, [&](int64_t first, int64_t count) {
    with_storage(gradient.storage, [&]<typename Storage>() { spread_layers<Storage>(gradient, first, count, stream); });
  });
}

} // namespace edl::cuda
