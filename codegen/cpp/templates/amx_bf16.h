// AMX with BF16 beside AVX-512: few rows of x are multiplied as without it, more by tiles.
#include "avx512_bf16.h"
#include "tiles.h"

using TileSum = float;

// sums += w * x, pairs of columns at a time; numbers below the smallest normal one count as zero.
template <int SUMS_IN, int W, int X_IN>
static inline void tile_multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS_IN), "i"(W), "i"(X_IN));
}

// Rows of x from which on tiles multiply them. Measured on Emerald Rapids, of 4096 x 4096: 2:4 is
// as fast either way at 2 rows of x, and 1.6 times as fast by tiles at 3.
constexpr int FEWEST_BY_TILES = 3;
