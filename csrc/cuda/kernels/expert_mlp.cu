// What expert_mlp does between its matrix products, on rows in the order of the experts: SwiGLU and its gradient,
// everything in float32 (float64 for float64). A warp per row, 16 bytes per lane where width and alignment allow it;
// each element is read and written once. Rows from *num_used on have no expert: their memory was never written, so it
// is not read either.
#include "cuda/kernels/expert_mlp.h"

#include "cuda/kernels/elements.cuh"
#include "cuda/kernels/score_rows.cuh"
#include "cuda/kernels/warp_rows.cuh"
#include "cuda/kernels/warps.cuh"

namespace edl::cuda {
namespace {

constexpr int kSlotsPerBlock = 16 * kThreads; // every block looks at all offsets

// Whether offsets do not rise from 0 to at most num_rows; all threads call.
__device__ bool are_wrong(const int32_t* offsets, int num_experts, int num_rows) {
  bool wrong = false;
  for (int e = threadIdx.x; e <= num_experts; e += kThreads) {
    wrong |= offsets[e] < (e > 0 ? offsets[e - 1] : 0) || offsets[e] > (e > 0 ? num_rows : 0);
  }
  return __syncthreads_or(wrong);
}

__global__ void __launch_bounds__(kThreads) check_rows(RowCheck task) {
  const bool wrong = are_wrong(task.offsets, task.num_experts, task.num_rows);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kSlotsPerBlock;
  for (int64_t i = first + threadIdx.x; i < first + kSlotsPerBlock && i < task.num_rows; i += kThreads) {
    task.checked_order[i] = wrong ? -1 : task.row_order[i];
  }
  if (blockIdx.x > 0) {
    return;
  }
  for (int e = threadIdx.x; e <= task.num_experts && !wrong; e += kThreads) {
    task.checked_offsets[e] = task.offsets[e];
  }
  if (wrong && threadIdx.x == 0) {
    int previous = 0;
    for (int e = 0; e <= task.num_experts; ++e) {
      const int highest = e > 0 ? task.num_rows : 0;
      const int offset = task.offsets[e] < highest ? task.offsets[e] : highest;
      previous = offset > previous ? offset : previous;
      task.checked_offsets[e] = previous;
    }
  }
}

template <typename Storage, int width>
__global__ void __launch_bounds__(kThreads, 4)
    swiglu(Storage* pre_activation, int64_t num_rows, const int32_t* num_used, int64_t columns, Storage* activation) {
  using Acc = Accumulation<Storage>;
  const int64_t i = row_of_warp();
  if (i >= num_rows) {
    return;
  }
  const int lane = threadIdx.x % kWarp;
  Storage* gate = pre_activation + i * 2 * columns;
  Storage* out = activation + i * columns;
  if (i >= *num_used) {
    fill_row(gate, 2 * columns, lane, Acc(0));
    fill_row(out, columns, lane, Acc(0));
    return;
  }
  for (int64_t c = lane * width; c < columns; c += kWarp * width) {
    const Pack<Storage, width> g = load_pack<width>(gate + c);
    const Pack<Storage, width> u = load_pack<width>(gate + columns + c);
    Pack<Storage, width> a;
#pragma unroll
    for (int j = 0; j < width; ++j) {
      const Acc x = widen(g.values[j]);
      a.values[j] = narrow<Storage>(x * sigmoid(x) * widen(u.values[j]));
    }
    store_pack<width>(a, out + c);
  }
}

template <typename Storage>
struct Backward {
  const Storage* pre_activation;
  const Storage* grad_activation;
  const int32_t* row_order;
  const Accumulation<Storage>* weights;
  int64_t num_rows;
  const int32_t* num_used;
  int64_t columns; // I
  Storage* activation;
  Storage* grad_pre_activation;
  Accumulation<Storage>* grad_weights;
  const Storage* more;
};

template <typename Storage, int width>
__global__ void __launch_bounds__(kThreads, 4) swiglu_backward(Backward<Storage> task) {
  using Acc = Accumulation<Storage>;
  const int64_t i = row_of_warp();
  if (i >= task.num_rows) {
    return;
  }
  const int lane = threadIdx.x % kWarp;
  const int64_t columns = task.columns;
  const Storage* gate = task.pre_activation + i * 2 * columns;
  const Storage* grad = task.grad_activation + i * columns;
  Storage* grad_gate = task.grad_pre_activation + i * 2 * columns;
  Storage* activation = task.activation + i * columns;
  const int64_t slot = task.row_order[i];
  const bool known = slot >= 0 && slot < task.num_rows;
  if (i >= *task.num_used || !known) {
    fill_row(grad_gate, 2 * columns, lane, Acc(0));
    fill_row(activation, columns, lane, Acc(0));
    if (known && lane == 0) {
      task.grad_weights[slot] = 0;
    }
    return;
  }
  const Acc weight = task.weights[slot];
  Acc dot = 0;
  for (int64_t c = lane * width; c < columns; c += kWarp * width) {
    const Pack<Storage, width> g = load_pack<width>(gate + c);
    const Pack<Storage, width> u = load_pack<width>(gate + columns + c);
    const Pack<Storage, width> d = load_pack<width>(grad + c);
    Pack<Storage, width> more = {};
    if (task.more != nullptr) {
      more = load_pack<width>(task.more + i * columns + c);
    }
    Pack<Storage, width> a, dg, du;
#pragma unroll
    for (int j = 0; j < width; ++j) {
      const Acc x = widen(g.values[j]);
      const Acc up = widen(u.values[j]);
      const Acc slope = widen(d.values[j]);
      const Acc s = sigmoid(x);
      const Acc silu = x * s;
      const Acc total = weight * slope + widen(more.values[j]);
      dot += slope * silu * up;
      // A row of weight 0 takes no part, whatever it holds; only the gradient of its weight reads it.
      a.values[j] = narrow<Storage>(weight == 0 ? Acc(0) : weight * silu * up);
      dg.values[j] = narrow<Storage>(weight == 0 ? Acc(0) : total * up * (s * (1 + x * (1 - s))));
      du.values[j] = narrow<Storage>(weight == 0 ? Acc(0) : total * silu);
    }
    store_pack<width>(a, activation + c);
    store_pack<width>(dg, grad_gate + c);
    store_pack<width>(du, grad_gate + columns + c);
  }
  dot = team_sum(dot, kWarp);
  if (lane == 0) {
    task.grad_weights[slot] = dot;
  }
}

__global__ void __launch_bounds__(kThreads)
    zero_unused(uint4* matrices, int64_t packs_per_matrix, const int32_t* offsets) {
  const int64_t expert = blockIdx.x;
  if (offsets[expert] != offsets[expert + 1]) {
    return;
  }
  uint4* matrix = matrices + expert * packs_per_matrix;
  const int64_t stride = static_cast<int64_t>(gridDim.y) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x; i < packs_per_matrix; i += stride) {
    matrix[i] = {0, 0, 0, 0};
  }
}

} // namespace

void launch_check_rows(const RowCheck& check, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(divide_up(check.num_rows, kSlotsPerBlock));
  EDL_LAUNCH(check_rows, blocks, kThreads, 0, stream, check);
}

void launch_swiglu(const SwigluTask& task, cudaStream_t stream) {
  const bool aligned = task.width * size_of(task.storage) % 16 == 0 && is_aligned_to_16(task.pre_activation) &&
      is_aligned_to_16(task.activation);
  with_storage(task.storage, [&]<typename Storage>() {
    with_pack<Storage>(aligned, [&]<int width>() {
      EDL_LAUNCH(
          (swiglu<Storage, width>), blocks_for(task.num_rows), kThreads, 0, stream,
          static_cast<Storage*>(task.pre_activation), task.num_rows, task.num_used, task.width,
          static_cast<Storage*>(task.activation));
    });
  });
}

void launch_swiglu_backward(const SwigluGradient& gradient, cudaStream_t stream) {
  const bool aligned = gradient.width * size_of(gradient.storage) % 16 == 0 &&
      is_aligned_to_16(gradient.pre_activation) && is_aligned_to_16(gradient.grad_activation) &&
      is_aligned_to_16(gradient.activation) && is_aligned_to_16(gradient.grad_pre_activation) &&
      is_aligned_to_16(gradient.more);
  with_storage(gradient.storage, [&]<typename Storage>() {
    using Acc = Accumulation<Storage>;
    const Backward<Storage> problem = {
        static_cast<const Storage*>(gradient.pre_activation),
        static_cast<const Storage*>(gradient.grad_activation),
        gradient.row_order,
        static_cast<const Acc*>(gradient.weights),
        gradient.num_rows,
        gradient.num_used,
        gradient.width,
        static_cast<Storage*>(gradient.activation),
        static_cast<Storage*>(gradient.grad_pre_activation),
        static_cast<Acc*>(gradient.grad_weights),
        static_cast<const Storage*>(gradient.more)};
    with_pack<Storage>(aligned, [&]<int width>() {
      EDL_LAUNCH((swiglu_backward<Storage, width>), blocks_for(gradient.num_rows), kThreads, 0, stream, problem);
    });
  });
}

void launch_zero_unused(
    void* matrices, int64_t num_experts, int64_t matrix_bytes, const int32_t* offsets, cudaStream_t stream) {
  constexpr int64_t kMostBlocks = 64; // per expert; nearly all of them have nothing to do
  const int64_t packs = matrix_bytes / 16;
  const int64_t wanted = divide_up(packs, kThreads);
  const dim3 blocks(
      static_cast<unsigned>(num_experts), static_cast<unsigned>(wanted < kMostBlocks ? wanted : kMostBlocks));
  EDL_LAUNCH(zero_unused, blocks, kThreads, 0, stream, static_cast<uint4*>(matrices), packs, offsets);
}

} // namespace edl::cuda
