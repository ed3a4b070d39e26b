#pragma once

// The tokens of aggregate_routing in chunks, sorted by segment: what its first pass leaves for the second, and how this
// finds the rows of a segment there.

#include "cuda/kernels/elements.cuh"
#include "cuda/kernels/routing_layers.cuh"
#include "cuda/kernels/warps.cuh"

namespace edl::cuda {

inline constexpr int kMostRows = 256; //  of a chunk; a thread each
inline constexpr int kLongGroup = 8; //   rows from which a group is summed in the first pass
inline constexpr int kMostSlots = kMostRows / kLongGroup;
inline constexpr int32_t kNoSegment = 0x7fffffff;
inline constexpr int64_t kMostScratchBytes = int64_t{64} << 20; // of more than one layer
inline constexpr int64_t kManyBlocks = 264; //  of the second pass: two for each of 132 multiprocessors
inline constexpr int64_t kManyChunks = 128; //  fewer are looked through sooner than parts are added up
inline constexpr int64_t kFewestChunks = 32; // of a part
inline constexpr int64_t kMostParts = 32; //    of a segment
inline constexpr int64_t kWidestTile = 512; //  columns
static_assert(kThreads == kMostRows);

// Fewer rows for few tokens, so that there are enough blocks.
inline int chunk_rows_for(int64_t num_tokens) {
  return num_tokens <= 16384 ? 64 : num_tokens <= 65536 ? 128 : 256;
}

// Blocks that share a segment of a layer in the second pass.
inline int64_t parts_for(int64_t chunks, int64_t num_segments, int64_t num_experts, int64_t num_layers) {
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

inline int64_t round_up_to_16(int64_t bytes) {
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
struct SumLayers {
  const Storage* routing[kMostLayers];
  int64_t row_stride[kMostLayers];
};

// Of a launch; of a layer once `of_layer` has looked it up.
template <typename Storage>
struct SumProblem {
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
__device__ inline void of_layer(const SumLayers<Storage>& layers, int layer, SumProblem<Storage>* problem) {
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
__device__ void sort_chunk(const SumProblem<Storage>& problem, int64_t first_row, int rows, SortedChunk* chunk) {
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
__device__ void write_index(const SumProblem<Storage>& problem, int64_t chunk_index, const SortedChunk& chunk) {
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
list_groups(const SumProblem<Storage>& problem, int64_t chunk_index, const Group& group, GroupList* list) {
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

} // namespace edl::cuda
