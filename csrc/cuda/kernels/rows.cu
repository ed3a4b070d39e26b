// Rows between the order of the tokens [T, H] and the order of the experts [N, H]: what dispatch_tokens, combine_tokens
// and expert_mlp share. A warp per row, or per token where rows are summed; 16 bytes per lane where width and alignment
// allow it. Sums in float32 (float64 for float64), in the order of a token's choices. Cost: each row is read and
// written once.
#include "cuda/kernels/rows.h"

#include "cuda/kernels/elements.cuh"
#include "cuda/kernels/warp_rows.cuh"
#include "cuda/kernels/warps.cuh"

namespace edl::cuda {
namespace {

__global__ void __launch_bounds__(kThreads)
    invert(const int32_t* row_order, int64_t num_rows, const int32_t* num_used, int32_t* row_of_slot) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= num_rows) {
    return;
  }
  const int64_t slot = row_order[i];
  if (slot >= 0 && slot < num_rows) {
    row_of_slot[slot] = num_used == nullptr || i < *num_used ? static_cast<int32_t>(i) : kNoExpert;
  }
}

template <typename Storage>
struct Gather {
  const Storage* tokens;
  int64_t tokens_stride;
  const int32_t* row_order;
  int64_t num_rows;
  const int32_t* num_used;
  const Accumulation<Storage>* weights;
  int64_t top_k;
  int64_t width;
  Storage* rows;
};

template <typename Storage, int width>
__global__ void __launch_bounds__(kThreads, 4) gather(Gather<Storage> task) {
  const int64_t i = row_of_warp();
  if (i >= task.num_rows) {
    return;
  }
  const int lane = threadIdx.x % kWarp;
  const int64_t slot = task.row_order[i];
  const bool used = task.num_used == nullptr || i < *task.num_used;
  const bool known = slot >= 0 && slot < task.num_rows;
  const bool weighs = known && (task.weights == nullptr || task.weights[slot] != 0);
  Storage* out = task.rows + i * task.width;
  if (used && weighs) {
    const Storage* token = task.tokens + slot / task.top_k * task.tokens_stride;
#pragma unroll 4
    for (int64_t c = lane * width; c < task.width; c += kWarp * width) {
      store_pack<width>(load_pack<width>(token + c), out + c);
    }
    return;
  }
  using Acc = Accumulation<Storage>;
  fill_row(out, task.width, lane, used && !known ? kNan<Acc> : Acc(0));
}

template <typename Storage>
struct Combine {
  const Storage* rows;
  int64_t rows_stride;
  const int32_t* row_of_slot;
  const Accumulation<Storage>* weights;
  bool already_weighted;
  int64_t num_tokens;
  int64_t top_k;
  int64_t width;
  Storage* output;
};

template <typename Storage, int width>
__global__ void __launch_bounds__(kThreads, 3) combine(Combine<Storage> task) {
  using Acc = Accumulation<Storage>;
  constexpr int at_once = 4; // rows in flight
  const int64_t t = row_of_warp();
  if (t >= task.num_tokens) {
    return;
  }
  const int lane = threadIdx.x % kWarp;
  for (int64_t c = lane * width; c < task.width; c += kWarp * width) {
    Acc sums[width] = {};
    for (int64_t first = 0; first < task.top_k; first += at_once) {
      Pack<Storage, width> packs[at_once];
      Acc factors[at_once];
#pragma unroll
      for (int k = 0; k < at_once; ++k) {
        packs[k] = {};
        factors[k] = 0;
        if (first + k < task.top_k) {
          const int64_t slot = t * task.top_k + first + k;
          const int64_t row = task.row_of_slot[slot];
          const Acc weight = task.weights != nullptr ? task.weights[slot] : Acc(1);
          if (row >= 0 && weight != 0) {
            packs[k] = load_pack<width>(task.rows + row * task.rows_stride + c);
            factors[k] = task.already_weighted ? Acc(1) : weight;
          } else if (row == kUnknown) {
            factors[k] = kNan<Acc>;
          }
        }
      }
#pragma unroll
      for (int k = 0; k < at_once; ++k) {
#pragma unroll
        for (int i = 0; i < width; ++i) {
          sums[i] += factors[k] * widen(packs[k].values[i]);
        }
      }
    }
    Pack<Storage, width> out;
#pragma unroll
    for (int i = 0; i < width; ++i) {
      out.values[i] = narrow<Storage>(sums[i]);
    }
    store_pack<width>(out, task.output + t * task.width + c);
  }
}

template <typename Storage>
struct CombineBackward {
  const Storage* grad_output;
  int64_t grad_output_stride;
  const Storage* rows;
  int64_t rows_stride;
  const int32_t* row_order;
  const Accumulation<Storage>* weights;
  int64_t num_rows;
  int64_t top_k;
  int64_t width;
  Storage* grad_rows;
  Accumulation<Storage>* grad_weights;
};

template <typename Storage, int width>
__global__ void __launch_bounds__(kThreads, 4) combine_backward(CombineBackward<Storage> task) {
  using Acc = Accumulation<Storage>;
  const int64_t i = row_of_warp();
  if (i >= task.num_rows) {
    return;
  }
  const int lane = threadIdx.x % kWarp;
  const int64_t slot = task.row_order[i];
  const bool known = slot >= 0 && slot < task.num_rows;
  const Acc weight = !known ? kNan<Acc> : task.weights != nullptr ? task.weights[slot] : Acc(1);
  const Storage* grad = task.grad_output + (known ? slot / task.top_k : 0) * task.grad_output_stride;
  const Storage* row = task.rows + i * task.rows_stride;
  Acc dot = 0;
  for (int64_t c = lane * width; c < task.width; c += kWarp * width) {
    const Pack<Storage, width> g = load_pack<width>(grad + c);
    if (task.grad_weights != nullptr) {
      const Pack<Storage, width> x = load_pack<width>(row + c);
#pragma unroll
      for (int j = 0; j < width; ++j) {
        dot += widen(g.values[j]) * widen(x.values[j]);
      }
    }
    if (task.grad_rows != nullptr) {
      Pack<Storage, width> out;
#pragma unroll
      for (int j = 0; j < width; ++j) {
        out.values[j] = narrow<Storage>(weight * widen(g.values[j]));
      }
      store_pack<width>(out, task.grad_rows + i * task.width + c);
    }
  }
  dot = team_sum(dot, kWarp);
  if (task.grad_weights != nullptr && known && lane == 0) {
    task.grad_weights[slot] = dot;
  }
}

} // namespace

void launch_invert(
    const int32_t* row_order, int64_t num_rows, const int32_t* num_used, int32_t* row_of_slot, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(divide_up(num_rows, kThreads));
  EDL_LAUNCH(invert, blocks, kThreads, 0, stream, row_order, num_rows, num_used, row_of_slot);
}

void launch_gather(const GatherTask& task, cudaStream_t stream) {
  const bool aligned =
      rows_are_aligned(task.tokens, task.tokens_stride, task.width, task.storage) && is_aligned_to_16(task.rows);
  with_storage(task.storage, [&]<typename Storage>() {
    const Gather<Storage> problem = {
        static_cast<const Storage*>(task.tokens),
        task.tokens_stride,
        task.row_order,
        task.num_rows,
        task.num_used,
        static_cast<const Accumulation<Storage>*>(task.weights),
        task.top_k,
        task.width,
        static_cast<Storage*>(task.rows)};
    with_pack<Storage>(aligned, [&]<int width>() {
      EDL_LAUNCH((gather<Storage, width>), blocks_for(task.num_rows), kThreads, 0, stream, problem);
    });
  });
}

void launch_combine(const CombineTask& task, cudaStream_t stream) {
  const bool aligned =
      rows_are_aligned(task.rows, task.rows_stride, task.width, task.storage) && is_aligned_to_16(task.output);
  with_storage(task.storage, [&]<typename Storage>() {
    const Combine<Storage> problem = {
        static_cast<const Storage*>(task.rows),
        task.rows_stride,
        task.row_of_slot,
        static_cast<const Accumulation<Storage>*>(task.weights),
        task.already_weighted,
        task.num_tokens,
        task.top_k,
        task.width,
        static_cast<Storage*>(task.output)};
    with_pack<Storage>(aligned, [&]<int width>() {
      EDL_LAUNCH((combine<Storage, width>), blocks_for(task.num_tokens), kThreads, 0, stream, problem);
    });
  });
}

void launch_combine_backward(const CombineGradient& gradient, cudaStream_t stream) {
  const bool aligned =
      rows_are_aligned(gradient.grad_output, gradient.grad_output_stride, gradient.width, gradient.storage) &&
      rows_are_aligned(gradient.rows, gradient.rows_stride, gradient.width, gradient.storage) &&
      is_aligned_to_16(gradient.grad_rows);
  with_storage(gradient.storage, [&]<typename Storage>() {
    using Acc = Accumulation<Storage>;
    const CombineBackward<Storage> problem = {
        static_cast<const Storage*>(gradient.grad_output),
        gradient.grad_output_stride,
        static_cast<const Storage*>(gradient.rows),
        gradient.rows_stride,
        gradient.row_order,
        static_cast<const Acc*>(gradient.weights),
        gradient.num_rows,
        gradient.top_k,
        gradient.width,
        static_cast<Storage*>(gradient.grad_rows),
        static_cast<Acc*>(gradient.grad_weights)};
    with_pack<Storage>(aligned, [&]<int width>() {
      EDL_LAUNCH((combine_backward<Storage, width>), blocks_for(gradient.num_rows), kThreads, 0, stream, problem);
    });
  });
}

} // namespace edl::cuda
