// sort_by_expert on the CPU: experts [T, K] → row_order [T·K], offsets [E + 1]. A counting sort: each chunk of slots
// counts its ids, a running sum over (expert, chunk) gives every chunk its places, each chunk fills them in. Integers
// only, so the number of chunks does not show in the result. Cost: two reads of experts, one write; scratch chunks · E.
#include "ops/sort_by_expert.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "common/errors.h"
#include "common/tensors.h"
#include "cpu/indices.h"

namespace edl::cpu {
namespace {

constexpr int64_t kSmallestChunk = 1 << 13;

struct Chunks {
  int64_t count;
  int64_t size;

  int64_t begin(int64_t chunk) const {
    return chunk * size;
  }
  int64_t end(int64_t chunk, int64_t total) const {
    return std::min(total, (chunk + 1) * size);
  }
};

// As many chunks as threads, unless their counters would outweigh the slots.
Chunks split(int64_t num_slots, int64_t num_experts) {
  const int64_t smallest = std::max(kSmallestChunk, 4 * num_experts);
  const int64_t count = std::clamp<int64_t>(num_slots / smallest, 1, at::get_num_threads());
  return {count, (num_slots + count - 1) / count};
}

// counts[chunk][e] for e in [0, E]; refuses ids outside.
std::vector<int32_t> count_ids(
    std::string_view op, const Indices& ids, int64_t num_slots, int64_t num_experts, const Chunks& chunks) {
  const int64_t width = num_experts + 1;
  std::vector<int32_t> counts(chunks.count * width, 0);
  std::vector<int64_t> first_bad(chunks.count, -1);
  at::parallel_for(0, chunks.count, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      int32_t* own = counts.data() + chunk * width;
      for (int64_t i = chunks.begin(chunk); i < chunks.end(chunk, num_slots); ++i) {
        const int64_t id = ids[i];
        if (id < 0 || id > num_experts) {
          first_bad[chunk] = i;
          break;
        }
        ++own[id];
      }
    }
  });
  for (const int64_t bad : first_bad) {
    EDL_ENSURE_INDEX(
        bad < 0, op, ": experts must be at least 0 and at most ", num_experts,
        ", the number of experts, which means no expert (got ", bad < 0 ? 0 : ids[bad], " at slot ", bad, ")");
  }
  return counts;
}

// Turns counts into the place of each chunk's first slot of each id, and fills offsets.
void places_from_counts(const Chunks& chunks, int64_t num_experts, int32_t* counts, int32_t* offsets) {
  int32_t next = 0;
  for (int64_t e = 0; e <= num_experts; ++e) {
    offsets[e] = next;
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
      int32_t& place = counts[chunk * (num_experts + 1) + e];
      const int32_t count = place;
      place = next;
      next += count;
    }
  }
}

std::tuple<at::Tensor, at::Tensor> sort_by_expert_cpu(
    const at::Tensor& experts, int64_t num_experts, std::string_view op) {
  check_sort_by_expert(op, experts, num_experts);
  check_memory(op, experts);
  const at::Tensor dense = experts.contiguous();
  const Indices ids(dense);
  const int64_t num_slots = dense.numel();
  at::Tensor row_order = at::empty({num_slots}, experts.options().dtype(at::kInt));
  at::Tensor offsets = at::empty({num_experts + 1}, experts.options().dtype(at::kInt));
  const Chunks chunks = split(num_slots, num_experts);
  std::vector<int32_t> places = count_ids(op, ids, num_slots, num_experts, chunks);
  places_from_counts(chunks, num_experts, places.data(), offsets.mutable_data_ptr<int32_t>());
  auto* order = row_order.mutable_data_ptr<int32_t>();
  at::parallel_for(0, chunks.count, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      int32_t* next = places.data() + chunk * (num_experts + 1);
      for (int64_t i = chunks.begin(chunk); i < chunks.end(chunk, num_slots); ++i) {
        order[next[ids[i]]++] = static_cast<int32_t>(i);
      }
    }
  });
  return {row_order, offsets};
}

} // namespace
} // namespace edl::cpu

TORCH_LIBRARY_IMPL(edl, CPU, m) {
  m.impl("sort_by_expert", edl::cpu::sort_by_expert_cpu);
}
