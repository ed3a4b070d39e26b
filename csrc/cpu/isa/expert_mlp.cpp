// Inner loops of expert_mlp between the matrix products: everything is computed in float32 (float64 for float64). Each loop
// reads and writes its rows once.
#include "cpu/isa/expert_mlp.h"

#include "cpu/isa/simd.h"

namespace edl::EDL_ISA {
namespace {

// The last, incomplete vector of a row goes through a buffer.
template <typename Storage, typename Acc = Accumulation<Storage>>
EDL_INLINE Vector<Acc> load_some(const Storage* data, int64_t count) {
  if (count >= kLanes<Acc>) {
    return load(data);
  }
  Vector<Acc> x{};
  for (int64_t lane = 0; lane < count; ++lane) {
    x[lane] = widen(data[lane]);
  }
  return x;
}

template <typename Acc, typename Storage>
EDL_INLINE void store_some(Vector<Acc> x, int64_t count, Storage* out) {
  if (count >= kLanes<Acc>) {
    store(x, out);
    return;
  }
  for (int64_t lane = 0; lane < count; ++lane) {
    narrow(x[lane], out + lane);
  }
}

template <typename Acc>
EDL_INLINE Vector<Acc> sigmoid_of(Vector<Acc> x) {
  const Vector<Acc> decay = exp_of(x < 0 ? x : -x); // exp(-|x|): no overflow on either side
  return (x < 0 ? decay : broadcast<Acc>(1)) / (1 + decay);
}

template <typename Storage>
void swiglu(const SwigluTask& task, int64_t begin, int64_t end) {
  using Acc = Accumulation<Storage>;
  const int64_t width = task.width;
  for (int64_t i = begin; i < end; ++i) {
    const auto* gate = static_cast<const Storage*>(task.pre_activation) + i * 2 * width;
    auto* out = static_cast<Storage*>(task.activation) + i * width;
    for (int64_t c = 0; c < width; c += kLanes<Acc>) {
      const Vector<Acc> g = load_some(gate + c, width - c);
      const Vector<Acc> u = load_some(gate + width + c, width - c);
      store_some<Acc>(g * sigmoid_of<Acc>(g) * u, width - c, out + c);
    }
  }
}

template <typename Storage>
void swiglu_backward(const SwigluGradient& task, int64_t begin, int64_t end) {
  using Acc = Accumulation<Storage>;
  const int64_t width = task.width;
  for (int64_t i = begin; i < end; ++i) {
    const auto* gate = static_cast<const Storage*>(task.pre_activation) + i * 2 * width;
    const auto* grad = static_cast<const Storage*>(task.grad_activation) + i * width;
    auto* grad_gate = static_cast<Storage*>(task.grad_pre_activation) + i * 2 * width;
    auto* activation = static_cast<Storage*>(task.activation) + i * width;
    const Acc weight = static_cast<const Acc*>(task.weights)[task.slots[i]];
    Vector<Acc> dots{};
    for (int64_t c = 0; c < width; c += kLanes<Acc>) {
      const int64_t count = width - c;
      const Vector<Acc> g = load_some(gate + c, count);
      const Vector<Acc> u = load_some(gate + width + c, count);
      const Vector<Acc> d = load_some(grad + c, count);
      const Vector<Acc> s = sigmoid_of<Acc>(g);
      const Vector<Acc> silu = g * s;
      const Vector<Acc> slope = s * (1 + g * (1 - s));
      dots += d * silu * u;
      store_some<Acc>(silu * u * weight, count, activation + c);
      store_some<Acc>(d * u * slope * weight, count, grad_gate + c);
      store_some<Acc>(d * silu * weight, count, grad_gate + width + c);
    }
    static_cast<Acc*>(task.grad_weights)[task.slots[i]] = sum_of<Acc>(dots);
  }
}

template <typename Storage>
void add_rows(const AddRowsTask& task, int64_t begin, int64_t end) {
  using Acc = Accumulation<Storage>;
  for (int64_t i = 0; i < task.num_rows; ++i) {
    const int64_t slot = task.slots[i];
    const Acc weight = task.weights != nullptr ? static_cast<const Acc*>(task.weights)[slot] : Acc(1);
    const auto* row = static_cast<const Storage*>(task.rows) + i * task.width;
    auto* sum = static_cast<Acc*>(task.sums) + slot / task.top_k * task.width;
    int64_t c = begin;
    for (; c + kLanes<Acc> <= end; c += kLanes<Acc>) {
      store(load(sum + c) + load(row + c) * weight, sum + c);
    }
    for (; c < end; ++c) {
      sum[c] += widen(row[c]) * weight;
    }
  }
}

} // namespace

#define EDL_ALL_STORAGE(loop) \
  { loop<float>, loop<double>, loop<BFloat16>, loop<Float16> }

extern const ExpertMlpLoops expert_mlp_loops = {
    EDL_ALL_STORAGE(swiglu),
    EDL_ALL_STORAGE(swiglu_backward),
    EDL_ALL_STORAGE(add_rows),
};

} // namespace edl::EDL_ISA
