// AVX-512, any keep bits: a register holds 16 columns, zeros where no value is kept.
#include "avx512_lanes.h"

constexpr int WIDTH = 16;  // columns of a block
constexpr int SUMS = 24;   // Sums that a thread keeps in registers
constexpr int INDEX_BITS = 0, KEY_BYTES = 2;
using Key = uint16_t;      // the keep bits of a block
using Lanes = __m512;

using Input = __m512;         // a block of x
static inline Input input(const X* x) {
    Input columns = _mm512_loadu_ps(x);
    asm("" : "+v"(columns));  // in a register: g++ would read it once for each row of W
    return columns;
}

static inline void multiply_add(Sum& sum, Lanes weights, Input x) {
    sum = _mm512_fmadd_ps(weights, x, sum);
}

static inline void stage_block(const Value* x, int64_t columns, X* staged) {
    stage_16(x, columns, staged);
}
