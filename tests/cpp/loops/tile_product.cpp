#include "tile_product.h"

#include "cpu/isa/tiles/tiles.h"

namespace edl::cpu::EDL_ISA {

void tile_product(const uint16_t* a, const uint16_t* b, float* c) {
  const TileConfiguration before = configuration_of_tiles();
  configure_tiles(TileConfiguration());
  load_tile<0>(c, 64);
  load_tile<1>(a, 64);
  load_tile<2>(b, 64);
  multiply_tiles<0, 1, 2>();
  store_tile<0>(c, 64);
  if (before.palette == 0) {
    release_tiles();
  } else {
    configure_tiles(before);
  }
}

} // namespace edl::cpu::EDL_ISA
