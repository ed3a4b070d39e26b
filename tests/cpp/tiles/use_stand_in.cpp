// What Python calls to run expert_mlp in bfloat16 on the stand-in of tiles, and to end it.
#include "cpu/expert_mlp_tiles.h"

namespace edl::cpu::tile_stand_in {
extern const ExpertMlpLoops expert_mlp_tiles;
}

extern "C" __attribute__((visibility("default"))) void edl_use_tile_stand_in(bool is_used) {
  edl::cpu::use_expert_mlp_tiles(is_used ? &edl::cpu::tile_stand_in::expert_mlp_tiles : nullptr);
}
