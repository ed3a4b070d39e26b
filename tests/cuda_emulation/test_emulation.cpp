// The emulation itself: what it computes, and that it finds mistakes.
#include "broken_kernels.h"
#include "support.h"

namespace {

using namespace edl_tests;
using edl_emulation::accesses_are_checked;

constexpr int kBlocks = 3;

// Empty where the kernel is right in every order.
std::string complaint(Mistake mistake) {
  Values numbers(kBlocks * 256), expected(numbers.size());
  for (size_t i = 0; i < numbers.size(); ++i) {
    numbers[i] = static_cast<double>(i);
    expected[i] = static_cast<double>(i / 256 * 256 + 255 - i % 256);
  }
  const Buffer in = Buffer::input("in", Element::int32, numbers);
  Buffer out = Buffer::output("out", Element::int32, kBlocks * 256);
  for (const Order order : {Order::forward, Order::reversed, Order::random}) {
    edl_emulation::set_order(order, 1);
    out.reset(1);
    try {
      launch_reverse(in.as<int>(), out.as<int>(), kBlocks, mistake);
    } catch (const std::runtime_error& error) {
      return error.what();
    }
    if (out.values() != expected) {
      return "wrong values";
    }
  }
  return "";
}

} // namespace

CATCH_TEST_CASE("the emulation runs a kernel in every order") {
  CATCH_CHECK(complaint(Mistake::none) == "");
}

CATCH_TEST_CASE("the emulation finds threads that wait at different places or for ever") {
  using Catch::Matchers::Contains;
  CATCH_CHECK_THAT(complaint(Mistake::barrier_in_a_branch), Contains("wait at different places"));
  CATCH_CHECK_THAT(
      complaint(Mistake::shuffle_without_a_lane), Contains("__syncthreads") && Contains("__shfl_xor_sync"));
  CATCH_CHECK_THAT(complaint(Mistake::return_before_barrier), Contains("1 of 256 threads have returned"));
}

CATCH_TEST_CASE(
    "the emulation finds a missing barrier by the order of threads, or as a race where accesses are checked") {
  using Catch::Matchers::Contains;
  for (const Mistake mistake : {Mistake::no_barrier, Mistake::no_warp_barrier, Mistake::write_of_two_blocks}) {
    const std::string sentence = complaint(mistake);
    if (accesses_are_checked()) {
      CATCH_CHECK_THAT(sentence, Contains("a race") || Contains("reads what was not written"));
    } else {
      CATCH_CHECK(sentence == "wrong values");
    }
  }
}

CATCH_TEST_CASE("the emulation finds reads of what was not written, and writes of inputs where accesses are checked") {
  using Catch::Matchers::Contains;
  CATCH_CHECK(complaint(Mistake::read_of_uninitialised_shared) != "");
  if (accesses_are_checked()) {
    CATCH_CHECK_THAT(complaint(Mistake::read_of_uninitialised_shared), Contains("reads what was not written"));
    CATCH_CHECK_THAT(complaint(Mistake::read_of_uninitialised_output), Contains("reads what was not written"));
    CATCH_CHECK_THAT(complaint(Mistake::write_of_input), Contains("an input is written"));
  }
}

// Of one program alone.
CATCH_TEST_CASE("every access is checked", "[.]") {
  CATCH_CHECK(accesses_are_checked());
}

// Not run with the others: the address sanitizer ends the program.
CATCH_TEST_CASE("past the end of an output", "[.]") {
  complaint(Mistake::past_the_end);
}
CATCH_TEST_CASE("past the end of shared memory", "[.]") {
  complaint(Mistake::past_shared_memory);
}
