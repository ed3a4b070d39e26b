#include "support.h"

using namespace edl_tests;

CATCH_TEST_CASE("sequence_segment_ids repeats a sequence's number over its tokens, and leaves out the label -1") {
  CATCH_REQUIRE(edl::sequence_segment_ids(ids({3, -1, 0}), 6).equal(at::tensor({0, 0, -1, -1, 2, 2}, at::kInt)));
  CATCH_REQUIRE(edl::sequence_segment_ids(ids({}), 0).numel() == 0);
}

CATCH_TEST_CASE("sequence_segment_ids refuses wrong arguments in one sentence") {
  CATCH_REQUIRE(
      error_of([] { edl::sequence_segment_ids(ids({0, 1}), 5); }) ==
      "edl::sequence_segment_ids: the tokens must be a whole number of sequences of one length (got 5 tokens "
      "for 2 sequences)");
}
