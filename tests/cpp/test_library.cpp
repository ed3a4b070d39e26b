#include "support.h"

CATCH_TEST_CASE("the library names its version and the instruction set in use") {
  CATCH_REQUIRE(std::string(edl::version()).find('.') != std::string::npos);
  const std::string name = edl::cpu_instruction_set();
  CATCH_REQUIRE((name == "baseline" || name == "avx2" || name == "avx512" || name == "avx512_amx"));
}
