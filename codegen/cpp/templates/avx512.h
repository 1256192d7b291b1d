// AVX-512, any keep bits: 16 values at hand are permuted to the columns that a table names for the
// keep bits. On Zen 4 that is half again as fast as vexpandps, which is 4 cycles from a register
// and microcoded from memory.
#include "avx512_lanes.h"
#include "orders.h"

constexpr int WIDTH = 16;  // columns of a block
constexpr int SUMS = 24;   // Sums that a thread keeps in registers
constexpr int INDEX_BITS = 0, KEY_BYTES = 2;
using Key = uint16_t;      // the keep bits of a block
using Lanes = __m512;

static inline Lanes expand(Key keep, Values values) {
    constexpr int COUNT = N ? WIDTH * N / M : WIDTH;
    const int low = keep & 255, high = keep >> 8;
    uint64_t orders[2];
    std::memcpy(&orders[0], ORDERS.order[low], 8);
    std::memcpy(&orders[1], ORDERS.order[high], 8);
    const __m512i order = _mm512_cvtepu8_epi32(_mm_set_epi64x(orders[1], orders[0]));
    const __m512i before = _mm512_maskz_set1_epi32(0xFF00, __builtin_popcount(low));
    return _mm512_maskz_permutexvar_ps(keep, _mm512_add_epi32(order, before), load<COUNT>(values));
}

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
