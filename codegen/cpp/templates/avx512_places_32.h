constexpr int WIDTH = 32;  // columns of a block
using Key = uint32_t;      // the keep bits of a block
#include "avx512_places.h"
