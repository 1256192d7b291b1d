constexpr int WIDTH = 64;  // columns of a block
using Key = uint64_t;      // the keep bits of a block
#include "avx512_places.h"
