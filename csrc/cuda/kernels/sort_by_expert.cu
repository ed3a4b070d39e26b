// sort_by_expert on CUDA: experts [N] → row_order [N], offsets [E + 1]: a stable counting sort in three launches.
//
// 1. `count_chunks`: a block counts the ids of a chunk of 1024 slots.
// 2. `scan_counts`: a block per id turns the chunks' counts into running sums, and leaves the total.
// 3. `place_slots`: a warp per chunk adds up the totals of lower ids, and then hands out places 32 slots at a time;
//    equal ids among the 32 find their order by a vote.
// Integers only: the result depends on the ids alone. An id outside [0, E] sorts last and leaves -1 in row_order, which
// makes the token's output NaN. Cost: two reads of experts, one write; scratch (N/1024 + 1) (E + 2) int32.
//
// Considered and left: a library's radix sort (its temporary memory and its ten launches cost more than these three).
#include "cuda/kernels/sort_by_expert.h"

#include "cuda/kernels/elements.cuh"
#include "cuda/kernels/warps.cuh"

namespace edl::cuda {
namespace {

constexpr int kChunk = 1024; //        slots
constexpr int kRoundsAtOnce = 8; //    of 32 slots, whose ids are read ahead
constexpr int kThreads = 256; //       of the first two launches
constexpr int64_t kSharedBytes = 48 * 1024; // that every device has without asking
static_assert(kChunk % (kRoundsAtOnce * kWarp) == 0);

struct Problem {
  Ids ids;
  int num_slots;
  int num_experts;
  int num_chunks;
  int32_t* counts; // [E + 2, chunks]: of every id, the sentinel E, and of ids outside [0, E]; then running sums
  int32_t* totals; // [E + 2]
  int32_t* row_order;
  int32_t* offsets;
};

// The id of a slot, E + 1 where it is outside [0, E].
__device__ inline int id_of(const Problem& problem, int slot) {
  const int64_t id = id_at(problem.ids, slot);
  return id >= 0 && id <= problem.num_experts ? static_cast<int>(id) : problem.num_experts + 1;
}

__global__ void __launch_bounds__(kThreads) count_chunks(Problem problem) {
  EDL_DYNAMIC_SHARED(int32_t, counts); // [E + 2]
  const int ids = problem.num_experts + 2;
  for (int id = threadIdx.x; id < ids; id += kThreads) {
    counts[id] = 0;
  }
  __syncthreads();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kChunk;
  for (int64_t slot = first + threadIdx.x; slot < first + kChunk && slot < problem.num_slots; slot += kThreads) {
    atomicAdd(&counts[id_of(problem, static_cast<int>(slot))], 1); // integers: any order gives the same
  }
  __syncthreads();
  for (int id = threadIdx.x; id < ids; id += kThreads) {
    problem.counts[static_cast<int64_t>(id) * problem.num_chunks + blockIdx.x] = counts[id];
  }
}

__global__ void __launch_bounds__(kThreads) scan_counts(Problem problem) {
  __shared__ int scratch[kThreads / kWarp];
  int32_t* counts = problem.counts + static_cast<int64_t>(blockIdx.x) * problem.num_chunks;
  int before = 0;
  for (int64_t first = 0; first < problem.num_chunks; first += kThreads) {
    const int64_t chunk = first + threadIdx.x;
    const int count = chunk < problem.num_chunks ? counts[chunk] : 0;
    int total;
    const int inside = block_exclusive_sum(count, scratch, &total);
    if (chunk < problem.num_chunks) {
      counts[chunk] = before + inside;
    }
    before += total;
  }
  if (threadIdx.x == 0) {
    problem.totals[blockIdx.x] = before;
  }
}

// places[id] = where this chunk's first slot of the id goes. The first chunk also writes the offsets. By one warp.
__device__ void fill_places(const Problem& problem, int chunk, int32_t* places) {
  const int lane = threadIdx.x;
  const int ids = problem.num_experts + 2;
  int before = 0;
  for (int first = 0; first < ids; first += kWarp) {
    const int id = first + lane;
    const int total = id < ids ? problem.totals[id] : 0;
    int inclusive = total;
    for (int step = 1; step < kWarp; step *= 2) {
      const int lower = __shfl_up_sync(kAllLanes, inclusive, step);
      inclusive += lane >= step ? lower : 0;
    }
    const int offset = before + inclusive - total;
    if (id < ids) {
      places[id] = offset + problem.counts[static_cast<int64_t>(id) * problem.num_chunks + chunk];
    }
    if (chunk == 0 && id <= problem.num_experts) {
      problem.offsets[id] = offset;
    }
    before += __shfl_sync(kAllLanes, inclusive, kWarp - 1);
  }
  __syncwarp();
}

// Hands out the places of 32 slots, one per lane; id -1 is no slot.
__device__ inline void place_round(const Problem& problem, int id, int64_t slot, int lane, int32_t* places) {
  const unsigned equal = __match_any_sync(kAllLanes, id);
  const int rank = __popc(equal & ((1u << lane) - 1));
  const int place = id >= 0 ? places[id] + rank : 0;
  __syncwarp(); // all have read their place before one of them moves it on
  if (id >= 0) {
    if (rank == 0) {
      places[id] = place + __popc(equal);
    }
    problem.row_order[place] = id <= problem.num_experts ? static_cast<int32_t>(slot) : -1;
  }
  __syncwarp();
}

__global__ void __launch_bounds__(kWarp) place_slots(Problem problem) {
  EDL_DYNAMIC_SHARED(int32_t, places); // [E + 2]
  const int lane = threadIdx.x;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kChunk;
  fill_places(problem, blockIdx.x, places);
  for (int64_t begin = first; begin < first + kChunk && begin < problem.num_slots; begin += kRoundsAtOnce * kWarp) {
    int ids[kRoundsAtOnce];
#pragma unroll
    for (int r = 0; r < kRoundsAtOnce; ++r) {
      const int64_t slot = begin + r * kWarp + lane;
      ids[r] = slot < problem.num_slots ? id_of(problem, static_cast<int>(slot)) : -1;
    }
#pragma unroll
    for (int r = 0; r < kRoundsAtOnce; ++r) {
      place_round(problem, ids[r], begin + r * kWarp + lane, lane, places);
    }
  }
}
int64_t shared_bytes_for(int64_t num_experts) {
  return (num_experts + 2) * static_cast<int64_t>(sizeof(int32_t));
}

} // namespace

int64_t most_experts_to_sort() {
  return kSharedBytes / static_cast<int64_t>(sizeof(int32_t)) - 2;
}

int64_t sort_scratch_size(int64_t num_slots, int64_t num_experts) {
  return (divide_up(num_slots, kChunk) + 1) * (num_experts + 2);
}

void launch_sort_by_expert(const SortTask& task, cudaStream_t stream) {
  const int64_t chunks = divide_up(task.num_slots, kChunk);
  const int64_t ids = task.num_experts + 2;
  const Problem problem = {
      {task.experts, task.experts_are_64_bit},
      static_cast<int>(task.num_slots),
      static_cast<int>(task.num_experts),
      static_cast<int>(chunks),
      task.scratch,
      task.scratch + chunks * ids,
      task.row_order,
      task.offsets};
  const auto blocks = static_cast<unsigned>(chunks);
  const auto shared = static_cast<size_t>(shared_bytes_for(task.num_experts));
  EDL_LAUNCH(count_chunks, blocks, kThreads, shared, stream, problem);
  EDL_LAUNCH(scan_counts, static_cast<unsigned>(ids), kThreads, 0, stream, problem);
  EDL_LAUNCH(place_slots, blocks, kWarp, shared, stream, problem);
}

} // namespace edl::cuda
