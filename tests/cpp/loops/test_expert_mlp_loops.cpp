// Every buffer is exactly as large as the contract says, so that the sanitizer sees each access outside.
#include <cmath>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include "catch.h"
#include "cpu/expert_mlp_plan.h"

namespace edl::cpu {
InstructionSet instruction_set() { // the tests name the tables themselves
  return InstructionSet::baseline;
}
} // namespace edl::cpu

namespace {

using namespace edl::cpu;
using edl::StorageType;
using Values = std::vector<double>;

constexpr int64_t kTokens = 150, kHidden = 301, kInner = 147, kTopK = 2, kExperts = 6, kPadding = 3;

std::vector<const ExpertMlpLoops*> tables() {
  std::vector<const ExpertMlpLoops*> found{&baseline::expert_mlp_loops};
#if defined(EDL_WITH_X86)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    found.push_back(&avx2::expert_mlp_loops);
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    found.push_back(&avx512::expert_mlp_loops);
  }
#endif
  return found;
}

// Storage as the loops see it: float, double, or the upper half of a float.
struct BFloat16 {
  uint16_t bits;
  BFloat16(double value = 0) {
    const float rounded = static_cast<float>(value);
    uint32_t all;
    std::memcpy(&all, &rounded, sizeof(all));
    bits = static_cast<uint16_t>((all + 0x8000) >> 16);
  }
  operator double() const {
    const uint32_t all = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &all, sizeof(value));
    return value;
  }
};

template <typename Storage>
std::vector<Storage> random_values(int64_t count, double scale, int seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal(0, scale);
  std::vector<Storage> values(count);
  for (Storage& value : values) {
    value = static_cast<Storage>(normal(generator));
  }
  return values;
}

template <typename Storage>
Values wide(const std::vector<Storage>& values) {
  return Values(values.begin(), values.end());
}

// Two slots per token: experts with 0, 1, 5, 11, 200 and 73 rows, and ten sentinels.
struct Routing {
  std::vector<int32_t> offsets{0, 0, 1, 6, 17, 217, 290};
  std::vector<int32_t> slots;
  Routing() {
    for (int64_t i = 0; i < kTokens * kTopK; ++i) {
      slots.push_back(static_cast<int32_t>(i * 7 % (kTokens * kTopK)));
    }
  }
};

struct Results {
  Values output, tokens, factors, gate_up, down;
};

double sigmoid(double x) {
  return 1 / (1 + std::exp(-x));
}

// The definition, one row after the other.
Results expected(
    const Routing& routing, const Values& x, const Values& w, const Values& gu, const Values& dn, const Values& go) {
  Results r{Values(x.size()), Values(x.size()), Values(w.size()), Values(gu.size()), Values(dn.size())};
  for (int64_t e = 0; e < kExperts; ++e) {
    const double *g = &gu[e * 2 * kInner * kHidden], *d = &dn[e * kHidden * kInner];
    double *grad_g = &r.gate_up[e * 2 * kInner * kHidden], *grad_d = &r.down[e * kHidden * kInner];
    for (int64_t row = routing.offsets[e]; row < routing.offsets[e + 1]; ++row) {
      const int64_t slot = routing.slots[row], token = slot / kTopK;
      const double *in = &x[token * kHidden], *grad = &go[token * kHidden];
      for (int64_t i = 0; i < kInner; ++i) {
        double gate = 0, up = 0, grad_a = 0;
        for (int64_t h = 0; h < kHidden; ++h) {
          gate += g[i * kHidden + h] * in[h];
          up += g[(kInner + i) * kHidden + h] * in[h];
          grad_a += d[h * kInner + i] * grad[h];
        }
        const double s = sigmoid(gate), a = gate * s * up, grad_up = w[slot] * grad_a * gate * s;
        const double grad_gate = w[slot] * grad_a * up * s * (1 + gate * (1 - s));
        r.factors[slot] += grad_a * a;
        for (int64_t h = 0; h < kHidden; ++h) {
          r.output[token * kHidden + h] += w[slot] * a * d[h * kInner + i];
          r.tokens[token * kHidden + h] += grad_gate * g[i * kHidden + h] + grad_up * g[(kInner + i) * kHidden + h];
          grad_g[i * kHidden + h] += grad_gate * in[h];
          grad_g[(kInner + i) * kHidden + h] += grad_up * in[h];
          grad_d[h * kInner + i] += w[slot] * a * grad[h];
        }
      }
    }
  }
  return r;
}

void over_columns(int64_t columns, int64_t width, const std::function<void(Columns)>& each) {
  for (int64_t begin = 0; begin < columns; begin += width) {
    each({begin, std::min(columns, begin + width)});
  }
}

std::vector<GradBlock> grad_blocks(const Window& window, const Routing& routing, int64_t rows, int64_t columns) {
  std::vector<GradBlock> blocks;
  for (const ExpertRows& e : window.experts) {
    for (int64_t row = 0; row < rows; row += kBlockRows) {
      over_columns(columns, kGradColumns, [&](Columns part) {
        blocks.push_back(
            {e, e.begin > routing.offsets[e.expert], e.end == routing.offsets[e.expert + 1], row, part.begin});
      });
    }
  }
  return blocks;
}

// Forward and backward over windows of `window_rows` rows.
template <typename Storage, typename Acc>
void check(const ExpertMlpLoops& loops, StorageType type, int64_t window_rows, double tolerance) {
  const int s = static_cast<int>(type);
  const Routing routing;
  const auto x = random_values<Storage>(kTokens * kHidden, 1, 1), go = random_values<Storage>(kTokens * kHidden, 1, 2);
  const auto gu = random_values<Storage>(kExperts * 2 * kInner * kHidden, std::pow(kHidden, -0.5), 3);
  const auto dn = random_values<Storage>(kExperts * kHidden * kInner, std::pow(kInner, -0.5), 4);
  const auto w = random_values<Acc>(kTokens * kTopK, 1, 5);
  const auto windows = cut_windows(routing.offsets.data(), kExperts, window_rows, 40);

  std::vector<Storage> pre(kTokens * kTopK * 2 * kInner), grad_gu(gu.size()), grad_dn(dn.size());
  std::vector<Acc> output(x.size()), tokens(x.size()), factors(w.size());
  std::vector<Acc> activation(window_rows * (kInner + kPadding)), grad_pre(window_rows * (2 * kInner + kPadding));
  std::vector<Acc> dots(window_rows * ((kInner + kWideColumns - 1) / kWideColumns)), carried(3 * kInner * kHidden);
  std::vector<Acc> own(expert_mlp_thread_elements(kHidden, kInner), std::nan(""));

  ExpertMlpTask task{};
  task.hidden_size = kHidden, task.intermediate_size = kInner, task.top_k = kTopK, task.slots = routing.slots.data();
  task.factors = w.data(), task.tokens = x.data(), task.tokens_stride = kHidden;
  task.gate_up = gu.data(), task.gate_up_strides[0] = 2 * kInner * kHidden, task.gate_up_strides[1] = kHidden;
  task.down = dn.data(), task.down_strides[0] = kHidden * kInner, task.down_strides[1] = kInner;
  task.pre_activation = pre.data(), task.sums = output.data();
  task.activation = activation.data(), task.activation_stride = kInner + kPadding, task.window_rows = window_rows;
  for (const Window& window : windows) {
    task.window_begin = window.begin();
    for (const ExpertRows& rows : window.blocks) {
      over_columns(
          kInner, kActivationColumns, [&](Columns part) { loops.activations[s](task, rows, part, own.data()); });
    }
    for (const Columns& part : cut_columns(kHidden, 3)) {
      loops.output[s](task, window.experts.data(), window.experts.size(), part, own.data());
    }
  }

  task.sums = tokens.data(), task.grad_output = go.data(), task.grad_output_stride = kHidden;
  task.grad_slots = routing.slots.data(), task.grad_top_k = kTopK;
  task.grad_factors = factors.data(), task.grad_gate_up = grad_gu.data(), task.grad_down = grad_dn.data();
  task.carried_gate_up = carried.data(), task.carried_down = carried.data() + 2 * kInner * kHidden;
  task.grad_pre_activation = grad_pre.data(), task.pre_activation_stride = 2 * kInner + kPadding,
  task.dots = dots.data();
  for (const Window& window : windows) {
    task.window_begin = window.begin();
    for (const ExpertRows& rows : window.blocks) {
      over_columns(
          kInner, kWideColumns, [&](Columns part) { loops.grad_activations[s](task, rows, part, own.data()); });
    }
    for (const Columns& part : cut_columns(kHidden, 2)) {
      loops.grad_tokens[s](task, window.experts.data(), window.experts.size(), part, own.data());
    }
    for (const GradBlock& block : grad_blocks(window, routing, 2 * kInner, kHidden)) {
      loops.grad_gate_up[s](task, block, own.data());
    }
    for (const GradBlock& block : grad_blocks(window, routing, kHidden, kInner)) {
      loops.grad_down[s](task, block, own.data());
    }
    loops.grad_factors[s](task, window.begin(), window.end());
  }

  const Results wanted = expected(routing, wide(x), wide(w), wide(gu), wide(dn), wide(go));
  const auto near = [&](const Values& actual, const Values& right) {
    double error = 0, largest = 0;
    for (size_t i = 0; i < right.size(); ++i) {
      error = std::max(error, std::abs(actual[i] - right[i]));
      largest = std::max(largest, std::abs(right[i]));
    }
    CATCH_CHECK(error <= tolerance * largest);
  };
  near(wide(output), wanted.output);
  near(wide(tokens), wanted.tokens);
  near(wide(factors), wanted.factors);
  near(wide(grad_gu), wanted.gate_up);
  near(wide(grad_dn), wanted.down);
}

} // namespace

CATCH_TEST_CASE("the loops of expert_mlp are right and stay inside their buffers") {
  for (const ExpertMlpLoops* loops : tables()) {
    for (const int64_t window_rows : {90, 400}) { // several windows for one expert, one window for all
      check<float, float>(*loops, StorageType::float32, window_rows, 3e-6);
      check<double, double>(*loops, StorageType::float64, window_rows, 1e-13);
      check<BFloat16, float>(*loops, StorageType::bfloat16, window_rows, 2e-2);
    }
  }
}
