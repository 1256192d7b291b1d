// AVX-512, any keep bits: 16 values at hand are permuted to the columns that a table names for the
// keep bits. On Zen 4 that is half again as fast as vexpandps, which is 4 cycles from a register
// and microcoded from memory.
#include "avx512_columns.h"
#include "orders.h"

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
