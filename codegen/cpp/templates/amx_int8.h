// AMX with INT8 beside AVX-512: few rows of x are multiplied as without it, more by tiles.
#include "avx512_int8.h"
#include "tiles.h"

using TileSum = int32_t;

// sums += w * x, four columns at a time, both signed.
template <int SUMS_IN, int W, int X_IN>
static inline void tile_multiply() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS_IN), "i"(W), "i"(X_IN));
}

// Rows of x from which on tiles multiply them. Measured on Emerald Rapids, 4096 x 4096: 2:4 takes
// a quarter longer by tiles at 4 rows of x, which few_rows() takes at once; 0.85 of its time at 6.
constexpr int FEWEST_BY_TILES = 5;
