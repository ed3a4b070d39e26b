// The inner products of a token's K rows, and their gradient: a warp per token forward, per row backward; 16 bytes per
// lane where width and alignment allow it. Sums in float32 (float64 for float64). A token's rows come from memory once
// and K times from the first cache.
#include "cuda/kernels/token_gram.h"

#include "cuda/kernels/elements.cuh"
#include "cuda/kernels/rows.h"
#include "cuda/kernels/warp_rows.cuh"
#include "cuda/kernels/warps.cuh"

namespace edl::cuda {
namespace {

constexpr int kAtOnce = 4; // rows that are multiplied with one

template <typename Storage>
struct Rows {
  const Storage* data;
  int64_t stride;
  const int32_t* row_of_slot;
  const Accumulation<Storage>* weights;
  int64_t num_tokens;
  int64_t top_k;
  int64_t width;

  // The row of a slot; kNoExpert where it takes no part, kUnknown where there is no telling.
  __device__ int64_t row_of(int64_t slot) const {
    return weights == nullptr || weights[slot] != 0 ? row_of_slot[slot] : kNoExpert;
  }
};

template <typename Storage>
Rows<Storage> rows_of(const TokenRows& tokens) {
  return {
      static_cast<const Storage*>(tokens.rows),
      tokens.rows_stride,
      tokens.row_of_slot,
      static_cast<const Accumulation<Storage>*>(tokens.weights),
      tokens.num_tokens,
      tokens.top_k,
      tokens.width};
}

// gram[j, first .. first + kAtOnce) of a token, and their mirror images; all lanes call.
template <int width, typename Storage, typename Acc = Accumulation<Storage>>
__device__ void multiply_rows(const Rows<Storage>& tokens, int64_t t, int64_t j, int64_t first, int lane, Acc* gram) {
  const int64_t top_k = tokens.top_k;
  const int64_t row = tokens.row_of(t * top_k + j);
  int64_t others[kAtOnce];
  Acc sums[kAtOnce] = {};
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    others[i] = first + i < top_k ? tokens.row_of(t * top_k + first + i) : kNoExpert;
  }
  if (row >= 0) {
    for (int64_t c = lane * width; c < tokens.width; c += kWarp * width) {
      const Pack<Storage, width> x = load_pack<width>(tokens.data + row * tokens.stride + c);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (others[i] >= 0) {
          const Pack<Storage, width> y = load_pack<width>(tokens.data + others[i] * tokens.stride + c);
#pragma unroll
          for (int v = 0; v < width; ++v) {
            sums[i] += widen(x.values[v]) * widen(y.values[v]);
          }
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    const int64_t k = first + i;
    Acc sum = team_sum(sums[i], kWarp);
    const bool is_unknown = row != kNoExpert && others[i] != kNoExpert && (row < 0 || others[i] < 0);
    sum = is_unknown ? kNan<Acc> : sum;
    if (lane == 0 && k < top_k) {
      gram[j * top_k + k] = sum;
      gram[k * top_k + j] = sum;
    }
  }
}

template <typename Storage, int width>
__global__ void __launch_bounds__(kThreads, 3) token_gram(Rows<Storage> tokens, Accumulation<Storage>* gram) {
  const int64_t t = row_of_warp();
  if (t >= tokens.num_tokens) {
    return; // the whole warp
  }
  const int lane = threadIdx.x % kWarp;
  for (int64_t j = 0; j < tokens.top_k; ++j) {
    for (int64_t first = j; first < tokens.top_k; first += kAtOnce) {
      multiply_rows<width>(tokens, t, j, first, lane, gram + t * tokens.top_k * tokens.top_k);
    }
  }
}

template <typename Storage>
struct Gradient {
  Rows<Storage> tokens;
  const Accumulation<Storage>* grad_gram;
  const int32_t* row_order;
  const int32_t* num_used;
  const Storage* grad_output;
  int64_t grad_output_stride;
  Accumulation<Storage>* grad_weights;
  Storage* grad_rows;
};

template <typename Storage, int width>
__global__ void __launch_bounds__(kThreads, 3) token_gram_backward(Gradient<Storage> task) {
  using Acc = Accumulation<Storage>;
  const Rows<Storage>& tokens = task.tokens;
  const int64_t i = row_of_warp();
  const int64_t num_rows = tokens.num_tokens * tokens.top_k;
  if (i >= num_rows) {
    return; // the whole warp
  }
  const int lane = threadIdx.x % kWarp;
  const int64_t slot = task.row_order[i];
  const bool known = slot >= 0 && slot < num_rows;
  const bool used = task.num_used == nullptr || i < *task.num_used;
  Storage* out = task.grad_rows + i * tokens.width;
  if (!known || !used) {
    fill_row(out, tokens.width, lane, used ? kNan<Acc> : Acc(0));
    if (known && task.grad_weights != nullptr && lane == 0) {
      task.grad_weights[slot] = 0;
    }
    return;
  }
  const int64_t t = slot / tokens.top_k;
  const int64_t k = slot % tokens.top_k;
  const Acc weight = tokens.weights == nullptr ? Acc(1) : tokens.weights[slot];
  const Storage* own = tokens.data + i * tokens.stride;
  const Storage* grad = task.grad_output == nullptr ? nullptr : task.grad_output + t * task.grad_output_stride;
  const Acc* of_gram = task.grad_gram + t * tokens.top_k * tokens.top_k;
  Acc dot = 0;
  for (int64_t c = lane * width; c < tokens.width; c += kWarp * width) {
    Acc sums[width] = {};
    if (grad != nullptr) {
      const Pack<Storage, width> g = load_pack<width>(grad + c);
      if (task.grad_weights != nullptr) {
        const Pack<Storage, width> x = load_pack<width>(own + c);
#pragma unroll
        for (int v = 0; v < width; ++v) {
          dot += widen(g.values[v]) * widen(x.values[v]);
        }
      }
#pragma unroll
      for (int v = 0; v < width; ++v) {
        sums[v] = weight * widen(g.values[v]);
      }
    }
    for (int64_t j = 0; j < tokens.top_k; ++j) {
      const int64_t row = tokens.row_of(t * tokens.top_k + j);
      if (row == kNoExpert) {
        continue;
      }
      Acc factor = of_gram[k * tokens.top_k + j] + of_gram[j * tokens.top_k + k];
      Pack<Storage, width> x = {};
      if (row >= 0) {
        x = load_pack<width>(tokens.data + row * tokens.stride + c);
      } else {
        factor = kNan<Acc>;
      }
#pragma unroll
      for (int v = 0; v < width; ++v) {
        sums[v] += factor * widen(x.values[v]);
      }
    }
    Pack<Storage, width> result;
#pragma unroll
    for (int v = 0; v < width; ++v) {
      result.values[v] = narrow<Storage>(weight == 0 ? Acc(0) : sums[v]); // whatever the others hold
    }
    store_pack<width>(result, out + c);
  }
  if (task.grad_weights != nullptr) {
    dot = team_sum(dot, kWarp);
    if (lane == 0) {
      task.grad_weights[slot] = dot;
    }
  }
}

} // namespace

void launch_token_gram(const TokenGramTask& task, cudaStream_t stream) {
  const TokenRows& tokens = task.tokens;
  const bool aligned = rows_are_aligned(tokens.rows, tokens.rows_stride, tokens.width, tokens.storage);
  with_storage(tokens.storage, [&]<typename Storage>() {
    with_pack<Storage>(aligned, [&]<int width>() {
      EDL_LAUNCH(
          (token_gram<Storage, width>), blocks_for(tokens.num_tokens), kThreads, 0, stream, rows_of<Storage>(tokens),
          static_cast<Accumulation<Storage>*>(task.gram));
    });
  });
}

void launch_token_gram_backward(const TokenGramGradient& gradient, cudaStream_t stream) {
  const TokenRows& tokens = gradient.tokens;
  const bool aligned = rows_are_aligned(tokens.rows, tokens.rows_stride, tokens.width, tokens.storage) &&
      rows_are_aligned(gradient.grad_output, gradient.grad_output_stride, tokens.width, tokens.storage) &&
      is_aligned_to_16(gradient.grad_rows);
  with_storage(tokens.storage, [&]<typename Storage>() {
    using Acc = Accumulation<Storage>;
    const Gradient<Storage> problem = {
        rows_of<Storage>(tokens),
        static_cast<const Acc*>(gradient.grad_gram),
        gradient.row_order,
        gradient.num_used,
        static_cast<const Storage*>(gradient.grad_output),
        gradient.grad_output_stride,
        static_cast<Acc*>(gradient.grad_weights),
        static_cast<Storage*>(gradient.grad_rows)};
    with_pack<Storage>(aligned, [&]<int width>() {
      EDL_LAUNCH(
          (token_gram_backward<Storage, width>), blocks_for(tokens.num_tokens * tokens.top_k), kThreads, 0, stream,
          problem);
    });
  });
}

} // namespace edl::cuda
