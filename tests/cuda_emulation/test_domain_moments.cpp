#include "cuda/kernels/domain_moments.h"

#include "support.h"

namespace {

using namespace edl_tests;

struct Case {
  int64_t layers, segments, domains, experts;
  bool shared_counts;
};
// One of everything; columns and segments that fill no warp; more segments than a block looks at together.
const Case kCases[] = {{1, 1, 1, 1, false}, {2, 7, 3, 33, true}, {2, 20, 5, 64, false}, {1, 300, 2, 40, false}};

enum class Labels { int32, int64, weights };

double weight_of(const Case& size, const Values& labels, Labels kind, int64_t s, int64_t d) {
  if (kind == Labels::weights) {
    const double weight = labels[s * size.domains + d];
    return weight >= 0 && std::isfinite(weight) ? weight : kNan;
  }
  return labels[s] < -1 || labels[s] >= static_cast<double>(size.domains) ? kNan
      : labels[s] == static_cast<double>(d)                               ? 1
                                                                          : 0;
}

// The memory of one call, filled: some segments are empty, some have no domain, domain 1 may have none.
struct Problem {
  Problem(const Case& size, Element element, Labels kind, double wrong_label)
      : size(size),
        kind(kind),
        sums(Buffer::input("segment_sums", element, random_values(size.layers * size.segments * size.experts, 3, 1))),
        counts(Buffer::input("segment_counts", element, counts_of(size))),
        labels(
            Buffer::input(
                "labels",
                kind == Labels::weights ? Element::float64 : ids_of(kind == Labels::int64),
                labels_of(size, kind, wrong_label))),
        all_counts(counts.values()) {}

  static Values counts_of(const Case& size) {
    Values counts = random_ids((size.shared_counts ? 1 : size.layers) * size.segments, 1, 50, 2);
    for (size_t i = 4; i < counts.size(); i += 6) {
      counts[i] = 0;
    }
    return counts;
  }
  static Values labels_of(const Case& size, Labels kind, double wrong_label) {
    const bool weights = kind == Labels::weights;
    Values labels = weights ? random_values(size.segments * size.domains, 1, 3)
                            : random_ids(size.segments, size.segments > 1 ? -1 : 0, size.domains - 1, 3);
    for (double& label : labels) {
      label = weights ? std::max(label, 0.0) : label; // half of the weights are 0
    }
    if (wrong_label != 0) {
      labels[labels.size() / 2] = wrong_label;
    }
    return labels;
  }

  edl::cuda::LabelledSegments view(Element element) const {
    return {
        .sums = sums.data(),
        .counts = counts.data(),
        .are_float64 = element == Element::float64,
        .counts_are_shared = size.shared_counts,
        .labels = labels.data(),
        .labels_are_64_bit = kind == Labels::int64,
        .labels_are_weights = kind == Labels::weights,
        .num_layers = size.layers,
        .num_segments = size.segments,
        .num_domains = size.domains,
        .num_experts = size.experts};
  }

  double count(int64_t layer, int64_t s) const {
    return all_counts[size.shared_counts ? s : layer * size.segments + s];
  }

  Case size;
  Labels kind;
  Buffer sums, counts, labels;
  Values all_counts;
};

void check_moments(const Case& size, Element element, Labels kind, bool with_squares, double wrong_label) {
  const Problem problem(size, element, kind, wrong_label);
  const int64_t rows = size.layers * size.domains;
  Buffer sums = Buffer::output("sums", Element::float64, rows * size.experts);
  Buffer squares = Buffer::output("squares", Element::float64, with_squares ? rows * size.experts : 0);
  Buffer counts = Buffer::output("counts", Element::float64, rows);
  run({&sums, &squares, &counts}, {}, [&] {
    edl::cuda::launch_domain_moments(
        problem.view(element), sums.as<double>(), with_squares ? squares.as<double>() : nullptr, counts.as<double>(),
        nullptr);
  });
  const Values x = problem.sums.values(), labels = problem.labels.values();
  Values expected(rows * size.experts), expected_squares(with_squares ? rows * size.experts : 0), expected_counts(rows);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t s = 0; s < size.segments; ++s) {
      const double weight = weight_of(size, labels, kind, s, row % size.domains);
      const double count = problem.count(row / size.domains, s);
      if (weight == 0 || (count <= 0 && !std::isnan(weight))) {
        continue;
      }
      expected_counts[row] += weight;
      for (int64_t e = 0; e < size.experts; ++e) {
        const double mean = x[(row / size.domains * size.segments + s) * size.experts + e] / count;
        expected[row * size.experts + e] += weight * (std::isnan(weight) ? 0 : mean);
        if (with_squares) {
          expected_squares[row * size.experts + e] += weight * (std::isnan(weight) ? 0 : mean * mean);
        }
      }
    }
  }
  const double relative = tolerance(Element::float64, Element::float64, size.segments);
  check_close(sums.values(), expected, relative, 1);
  check_close(squares.values(), expected_squares, relative);
  check_close(counts.values(), expected_counts, relative);
}

void check_backward(const Case& size, Element element, Labels kind, bool with_squares, double wrong_label) {
  const Problem problem(size, element, kind, wrong_label);
  const int64_t moments = size.layers * size.domains * size.experts;
  const Buffer grad_sums = Buffer::input("grad_sums", Element::float64, random_values(moments, 1, 4));
  const Buffer grad_squares = Buffer::input("grad_squares", Element::float64, random_values(moments, 1, 5));
  Buffer grad = Buffer::output("grad_segment_sums", element, size.layers * size.segments * size.experts);
  run({&grad}, {}, [&] {
    edl::cuda::launch_domain_moments_backward(
        problem.view(element), grad_sums.as<double>(), with_squares ? grad_squares.as<double>() : nullptr, grad.data(),
        nullptr);
  });
  const Values x = problem.sums.values(), labels = problem.labels.values();
  const Values g = grad_sums.values(), h = grad_squares.values();
  Values expected(size.layers * size.segments * size.experts);
  for (int64_t row = 0; row < size.layers * size.segments; ++row) {
    const int64_t layer = row / size.segments, s = row % size.segments;
    const double count = problem.count(layer, s);
    for (int64_t d = 0; d < size.domains; ++d) {
      const double weight = weight_of(size, labels, kind, s, d);
      for (int64_t e = 0; e < size.experts; ++e) {
        const int64_t at = (layer * size.domains + d) * size.experts + e;
        const double mean = x[row * size.experts + e] / count;
        const bool counts = weight != 0 && (count > 0 || (std::isnan(weight) && kind != Labels::weights));
        expected[row * size.experts + e] +=
            counts ? weight * (g[at] + (with_squares ? 2 * mean * h[at] : 0)) / std::max(count, 1.0) : 0;
      }
    }
  }
  check_close(grad.values(), expected, tolerance(element, Element::float64, size.domains), 1);
}

template <typename Check>
void check_all(const Check& check) {
  for (const Element element : {Element::float32, Element::float64}) {
    for (const Case& size : kCases) {
      for (const Labels kind : {Labels::int32, Labels::int64, Labels::weights}) {
        check(size, element, kind, true, 0);
        check(size, element, kind, false, 0);
      }
    }
    for (const double wrong : {-2.0, 3.0}) {
      check(kCases[1], element, Labels::int32, true, wrong);
      check(kCases[1], element, Labels::int64, false, wrong);
    }
    for (const double wrong : {-0.5, kNan, std::numeric_limits<double>::infinity()}) {
      check(kCases[1], element, Labels::weights, true, wrong);
    }
  }
}

} // namespace

CATCH_TEST_CASE("domain_moments: sums, squares and counts of every domain; NaN for labels that are not allowed") {
  check_all(check_moments);
}

CATCH_TEST_CASE("domain_moments: a count of NaN shows") {
  const Buffer sums = Buffer::input("sums", Element::float64, {1, 2, 3, 4});
  const Buffer counts = Buffer::input("counts", Element::float64, {kNan, 2});
  const Buffer labels = Buffer::input("labels", Element::int32, {0, 1});
  Buffer out = Buffer::output("out", Element::float64, 4), out_counts = Buffer::output("counts", Element::float64, 2);
  run({&out, &out_counts}, {}, [&] {
    edl::cuda::launch_domain_moments(
        {.sums = sums.data(),
         .counts = counts.data(),
         .are_float64 = true,
         .counts_are_shared = false,
         .labels = labels.data(),
         .labels_are_64_bit = false,
         .labels_are_weights = false,
         .num_layers = 1,
         .num_segments = 2,
         .num_domains = 2,
         .num_experts = 2},
        out.as<double>(), nullptr, out_counts.as<double>(), nullptr);
  });
  check_close(out.values(), {kNan, kNan, 1.5, 2}, 0);
}

CATCH_TEST_CASE("domain_moments: no segments and no experts") {
  for (const Case& size : {Case{2, 0, 3, 40, false}, Case{2, 5, 3, 0, false}}) {
    check_moments(size, Element::float32, Labels::int32, true, 0);
  }
}

CATCH_TEST_CASE("domain_moments_backward: the gradient of the segments' sums") {
  check_all(check_backward);
}
