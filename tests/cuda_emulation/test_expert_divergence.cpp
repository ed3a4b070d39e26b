#include "cuda/kernels/expert_divergence.h"

#include "support.h"

namespace {

using namespace edl_tests;
using Real = long double;

struct Case {
  int64_t layers, domains, experts;
  double spread; // of a domain's preferences: what tells domains apart
};
// One domain; more than a block has warps; experts that fill no warp; domains that are almost equal.
const Case kCases[] = {{1, 1, 4, 1}, {2, 2, 33, 1}, {2, 5, 1, 1}, {1, 11, 20, 0.1}, {3, 3, 70, 2}, {1, 2, 40, 1e-5}};

// Moments [L, D, E] of segments that draw from their domain's distribution. Domain 1 of several has no segment, and
// domain 2 has one.
struct Moments {
  explicit Moments(const Case& size, int64_t most_segments = 6) : size(size) {
    const int64_t rows = size.layers * size.domains;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t domain = row % size.domains;
      const int64_t n = size.domains > 3 && domain == 1 ? 0
          : size.domains > 3 && domain == 2             ? 1
                                                        : 2 + row % (most_segments - 1);
      const Values preference = random_values(size.experts, size.spread, 10 + row);
      Values sum(size.experts), square(size.experts);
      for (int64_t s = 0; s < n; ++s) {
        Values logits = random_values(size.experts, 0.3 * size.spread, 1000 * row + s);
        for (int64_t e = 0; e < size.experts; ++e) {
          logits[e] += preference[e];
        }
        const Values p = score(logits, Scores::softmax);
        for (int64_t e = 0; e < size.experts; ++e) {
          sum[e] += p[e];
          square[e] += p[e] * p[e];
        }
      }
      sums.insert(sums.end(), sum.begin(), sum.end());
      squares.insert(squares.end(), square.begin(), square.end());
      counts.push_back(static_cast<double>(n));
    }
  }

  Case size;
  Values sums, squares, counts;
};

bool takes_part(double count, bool with_bias) {
  return with_bias ? !(count < 2) : !(count <= 0);
}

struct Pair {
  Real divergence, bias;
};

// Jensen-Shannon divergence of two rows of moments and, to second order, what noise adds to it.
Pair pair_of(const Moments& m, int64_t j, int64_t k) {
  const int64_t experts = m.size.experts;
  const Real n = m.counts[j], o = m.counts[k];
  Pair pair = {0, 0};
  for (int64_t e = 0; e < experts; ++e) {
    const Real a = m.sums[j * experts + e], b = m.sums[k * experts + e];
    const Real p = a / n, q = b / o, mean = (p + q) / 2, u = (p - q) / (p + q);
    pair.divergence += mean == 0 ? 0 : (p * (p > 0 ? log1pl(u) : 0) + q * (q > 0 ? log1pl(-u) : 0)) / 2;
    const Real own = (m.squares[j * experts + e] - a * a / n) / (n - 1) / n;
    const Real other = (m.squares[k * experts + e] - b * b / o) / (o - 1) / o;
    pair.bias += (own + other) / (8 * mean);
  }
  return pair;
}

// Calls `each(j, k)` for the pairs of a layer that take part, and returns their number.
template <typename Each>
int64_t over_pairs(const Moments& m, int64_t layer, bool with_bias, const Each& each) {
  int64_t pairs = 0;
  for (int64_t j = layer * m.size.domains; j < (layer + 1) * m.size.domains; ++j) {
    for (int64_t k = j + 1; k < (layer + 1) * m.size.domains; ++k) {
      if (takes_part(m.counts[j], with_bias) && takes_part(m.counts[k], with_bias)) {
        each(j, k);
        ++pairs;
      }
    }
  }
  return pairs;
}

// The memory of one call.
struct Memory {
  Memory(const Moments& moments, bool with_bias)
      : size(moments.size),
        with_bias(with_bias),
        sums(Buffer::input("sums", Element::float64, moments.sums)),
        squares(Buffer::input("squares", Element::float64, moments.squares)),
        counts(Buffer::input("counts", Element::float64, moments.counts)),
        divergences(Buffer::output("divergences", Element::float64, pairs())),
        biases(Buffer::output("biases", Element::float64, with_bias ? pairs() : 0)),
        present(Buffer::output("present", Element::int32, size.layers * (size.domains + 1))),
        means(Buffer::output("means", Element::float64, size.layers)),
        loss(Buffer::output("loss", Element::float64, size.layers)),
        grad_sums(Buffer::output("grad_sums", Element::float64, moments.sums.size())),
        grad_squares(Buffer::output("grad_squares", Element::float64, with_bias ? moments.sums.size() : 0)) {}

  int64_t pairs() const {
    return size.layers * size.domains * size.domains;
  }
  edl::cuda::DomainMoments view() const {
    return {
        .sums = sums.as<double>(),
        .squares = with_bias ? squares.as<double>() : nullptr,
        .counts = counts.as<double>(),
        .num_layers = size.layers,
        .num_domains = size.domains,
        .num_experts = size.experts};
  }

  Case size;
  bool with_bias;
  Buffer sums, squares, counts, divergences, biases, present, means, loss, grad_sums, grad_squares;
};

// As expert_divergence calls them.
void run_loss(
    Memory& memory,
    double eps,
    bool log_of_mean,
    bool with_gradient,
    const std::vector<Order>& orders = every_order()) {
  std::vector<Buffer*> results = {&memory.loss};
  if (with_gradient) {
    results.insert(results.end(), {&memory.grad_sums, &memory.grad_squares});
  }
  run(
      results, {&memory.divergences, &memory.biases, &memory.present, &memory.means},
      [&] {
        double* biases = memory.with_bias ? memory.biases.as<double>() : nullptr;
        edl::cuda::launch_pair_divergences(
            memory.view(), false, memory.divergences.as<double>(), biases, memory.present.as<int32_t>(), nullptr);
        edl::cuda::launch_divergence_loss(
            memory.view(),
            {.eps = eps,
             .log_of_mean = log_of_mean,
             .divergences = memory.divergences.as<double>(),
             .biases = biases,
             .present = memory.present.as<int32_t>(),
             .means = memory.means.as<double>(),
             .loss = memory.loss.as<double>(),
             .grad_sums = with_gradient ? memory.grad_sums.as<double>() : nullptr,
             .grad_squares = with_gradient && memory.with_bias ? memory.grad_squares.as<double>() : nullptr},
            nullptr);
      },
      orders);
}

constexpr double kEps = 1e-6;

// The loss of a layer, and what its gradient is the gradient of: with bias correction -Σ (D - b) / c with a constant c.
struct Loss {
  Real value, differentiated;
};
Loss loss_of(const Moments& m, int64_t layer, bool log_of_mean, bool with_bias, const Moments& constants) {
  Real sum = 0, differentiated = 0;
  const int64_t pairs = over_pairs(m, layer, with_bias, [&](int64_t j, int64_t k) {
    const Pair pair = pair_of(m, j, k);
    sum += log_of_mean ? pair.divergence : -logl(pair.divergence + kEps);
    if (with_bias) {
      const Pair constant = pair_of(constants, j, k);
      const Real scale = std::max(constant.divergence, constant.bias) + constant.bias + kEps;
      differentiated -= (pair.divergence - pair.bias) / scale;
    }
  });
  if (pairs == 0) {
    return {0, 0};
  }
  const Real value = log_of_mean ? -logl(sum / pairs + kEps) : sum / pairs;
  return {value, with_bias ? differentiated / pairs : value};
}

// A central difference over `step` times the value at i.
Real difference(
    const Moments& moments, Values Moments::* which, int64_t i, double step, bool log_of_mean, bool with_bias) {
  const int64_t layer = i / (moments.size.domains * moments.size.experts);
  Moments up = moments, down = moments;
  (up.*which)[i] *= 1 + step;
  (down.*which)[i] *= 1 - step;
  const Real width = static_cast<Real>((up.*which)[i]) - static_cast<Real>((down.*which)[i]);
  const Real change = loss_of(up, layer, log_of_mean, with_bias, moments).differentiated -
      loss_of(down, layer, log_of_mean, with_bias, moments).differentiated;
  return width == 0 ? 0 : change / width;
}

// What two central differences together leave out is of the order of the step to the fourth; squares enter linearly, and
// a long step keeps their small numbers above the rounding of the loss.
Values numeric_gradient(const Moments& moments, Values Moments::* which, bool log_of_mean, bool with_bias) {
  const double step = which == &Moments::squares ? 0.25 : 1e-3;
  Values gradient;
  for (int64_t i = 0; i < static_cast<int64_t>(moments.sums.size()); ++i) {
    const Real one = difference(moments, which, i, step, log_of_mean, with_bias);
    const Real two = difference(moments, which, i, 2 * step, log_of_mean, with_bias);
    gradient.push_back(static_cast<double>((4 * one - two) / 3));
  }
  return gradient;
}

} // namespace

CATCH_TEST_CASE("pair_divergences: every pair, its bias, and NaN for domains that do not take part") {
  for (const Case& size : kCases) {
    for (const int kind : {0, 1, 2}) { // without bias, with it beside, with it subtracted
      const Moments moments(size);
      const bool with_bias = kind > 0;
      Memory memory(moments, with_bias);
      std::vector<Buffer*> results = {&memory.divergences};
      if (kind == 1) {
        results.push_back(&memory.biases);
      }
      run(results, {}, [&] {
        edl::cuda::launch_pair_divergences(
            memory.view(), kind == 2, memory.divergences.as<double>(), kind == 1 ? memory.biases.as<double>() : nullptr,
            nullptr, nullptr);
      });
      Values expected(memory.pairs(), kNan), expected_biases(memory.pairs(), 0);
      for (int64_t row = 0; row < size.layers * size.domains; ++row) {
        if (takes_part(moments.counts[row], with_bias)) {
          expected[row * size.domains + row % size.domains] = 0;
        }
      }
      for (int64_t layer = 0; layer < size.layers; ++layer) {
        over_pairs(moments, layer, with_bias, [&](int64_t j, int64_t k) {
          const Pair pair = pair_of(moments, j, k);
          for (const int64_t at : {j * size.domains + k % size.domains, k * size.domains + j % size.domains}) {
            expected[at] = static_cast<double>(kind == 2 ? pair.divergence - pair.bias : pair.divergence);
            expected_biases[at] = static_cast<double>(pair.bias);
          }
        });
      }
      // The rounding of the means enters a divergence by its root; variances are differences of moments of size 1.
      const double relative = tolerance(Element::float64, Element::float64, size.experts);
      Real largest = 0;
      for (const double divergence : expected) {
        largest = std::isfinite(divergence) ? std::max<Real>(largest, std::abs(divergence)) : largest;
      }
      check_close(memory.divergences.values(), expected, relative, kind == 2 ? 1 : static_cast<double>(sqrtl(largest)));
      if (kind == 1) {
        check_close(memory.biases.values(), expected_biases, relative, 1);
      }
    }
  }
}

CATCH_TEST_CASE("divergence_loss: its value and gradient, both reductions, with and without bias correction") {
  for (const Case& size : kCases) {
    if (size.spread < 0.01) {
      continue; // differences are no gradient there
    }
    for (const int kind : {0, 1, 2}) { // mean of logs, log of mean, mean of logs with bias correction
      const bool log_of_mean = kind == 1, with_bias = kind == 2;
      CATCH_CAPTURE(size.domains, size.experts, kind);
      const Moments moments(size);
      Memory memory(moments, with_bias);
      Values expected;
      for (int64_t layer = 0; layer < size.layers; ++layer) {
        expected.push_back(static_cast<double>(loss_of(moments, layer, log_of_mean, with_bias, moments).value));
      }
      const double relative = tolerance(Element::float64, Element::float64, size.experts * size.domains);
      run_loss(memory, kEps, log_of_mean, false);
      check_close(memory.loss.values(), expected, relative, 1);
      run_loss(memory, kEps, log_of_mean, true);
      check_close(memory.loss.values(), expected, relative, 1);
      if (size.experts == 1 && !with_bias) { // equal domains: no gradient but for roundings, which eps divides
        check_close(memory.grad_sums.values(), Values(moments.sums.size(), 0), relative, 1 / kEps);
        continue;
      }
      const double of_differences = 1e-9;
      check_close(
          memory.grad_sums.values(), numeric_gradient(moments, &Moments::sums, log_of_mean, with_bias), of_differences);
      if (with_bias) {
        check_close(
            memory.grad_squares.values(), numeric_gradient(moments, &Moments::squares, log_of_mean, with_bias),
            of_differences);
      }
    }
  }
}

CATCH_TEST_CASE("divergence_loss: not a bit depends on which domains are absent, nor on what they hold") {
  const int64_t present = 19, experts = 33;
  for (const int kind : {0, 1, 2}) { // mean of logs, log of mean, mean of logs with bias correction
    const bool log_of_mean = kind == 1, with_bias = kind == 2;
    Moments moments({1, present, experts, 1});
    for (double& count : moments.counts) {
      count = std::max(count, 2.0);
    }
    Memory alone(moments, with_bias);
    run_loss(alone, kEps, log_of_mean, true);
    for (const int64_t distance : {2, 15}) { // every second domain is there, or every fifteenth
      Moments among({1, present * distance, experts, 1});
      among.sums.assign(among.sums.size(), kNan);
      among.squares.assign(among.squares.size(), kNan);
      among.counts.assign(among.counts.size(), with_bias ? 1 : 0);
      for (int64_t d = 0; d < present; ++d) {
        const int64_t row = d * distance + 1;
        std::copy_n(moments.sums.begin() + d * experts, experts, among.sums.begin() + row * experts);
        std::copy_n(moments.squares.begin() + d * experts, experts, among.squares.begin() + row * experts);
        among.counts[row] = moments.counts[d];
      }
      Memory memory(among, with_bias);
      run_loss(memory, kEps, log_of_mean, true);
      CATCH_CHECK(memory.loss.bytes() == alone.loss.bytes());
      const Values gradient = memory.grad_sums.values(), expected = alone.grad_sums.values();
      for (int64_t d = 0; d < present; ++d) {
        CATCH_CHECK(row_of(gradient, d * distance + 1, experts, experts) == row_of(expected, d, experts, experts));
      }
    }
  }
}

CATCH_TEST_CASE("divergence_loss: more domains than a block has threads") {
  const Moments moments({1, 260, 2, 1}, 3);
  Memory memory(moments, false);
  run_loss(memory, kEps, false, true, {Order::random});
  const double expected = static_cast<double>(loss_of(moments, 0, false, false, moments).value);
  check_close(memory.loss.values(), {expected}, tolerance(Element::float64, Element::float64, 260 * 260));
}

CATCH_TEST_CASE("divergence_loss: equal domains are a saddle, probabilities of zero have a finite slope, NaN shows") {
  Moments moments({1, 3, 4, 1});
  moments.sums = {2, 1, 1, 0, 2, 1, 1, 0, 0, 3, 1, 0};
  moments.counts = {4, 4, 4};
  Memory memory(moments, false);
  run_loss(memory, 0, true, true);
  const Real divergence = pair_of(moments, 0, 2).divergence;
  check_close(memory.loss.values(), {static_cast<double>(-logl(2 * divergence / 3))}, 1e-14);
  const double lowest = std::log(std::ldexp(1.0, -126)), at_zero = -0.5 * lowest / static_cast<double>(2 * divergence);
  CATCH_CHECK(std::abs(memory.grad_sums.values()[8] - 2 * at_zero / 4) < 1e-12 * at_zero);
  moments.sums[1] = kNan;
  Memory with_nan(moments, false);
  run_loss(with_nan, 0, true, true);
  CATCH_CHECK(std::isnan(with_nan.loss.values()[0]));
}
