// AVX-512, N:M with at most half kept: a block of 32 columns of x waits in two registers, and its
// (at most 16) values of W pick theirs by index. No lane is spent on a zero. Columns that hold no
// value are not read: NaN or infinity there does not reach y.
#include "avx512_lanes.h"

constexpr int WIDTH = 32;                      // columns of a block
constexpr int SUMS = 16;                       // Sums that a thread keeps in registers
constexpr int PICKED = WIDTH * N / M;          // values of a block, at most 16
constexpr int INDEX_BITS = M == 4 ? 2 : 4;     // of one value: its column in its group of M
constexpr int KEY_BYTES = PICKED * INDEX_BITS / 8;
using Key = uint64_t;                          // the indices of a block
struct Lanes { __m512 values; __m512i columns; };

struct Lane { int32_t shift[16], group[16]; };
static constexpr Lane lanes_of_block() {
    Lane lane = {};
    for (int i = 0; i < 16; ++i) {
        lane.shift[i] = M == 4 ? 2 * i : 4 * (i % 2);
        lane.group[i] = i < PICKED ? i / N * M : 0;  // where the value's group begins
    }
    return lane;
}
alignas(64) static constexpr Lane LANE = lanes_of_block();

static inline Lanes expand(Key key, Values values) {
    const __m128i bytes = _mm_cvtsi64_si128(key);
    const __m512i packed = M == 4
        ? _mm512_set1_epi32(static_cast<int>(key))
        : _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(bytes, bytes));  // a byte for each two lanes
    const __m512i shifted = _mm512_srlv_epi32(packed, _mm512_load_si512(LANE.shift));
    const __m512i mask = _mm512_set1_epi32((1 << INDEX_BITS) - 1);
    // 0xEA: (shifted & mask) | group
    return {load<PICKED>(values),
            _mm512_ternarylogic_epi32(shifted, mask, _mm512_load_si512(LANE.group), 0xEA)};
}

struct Input { __m512 low, high; };  // a block of x
static inline Input input(const X* x) {
    Input columns = {_mm512_loadu_ps(x), _mm512_loadu_ps(x + 16)};
    // In registers: g++ would read them once for each row of W.
    asm("" : "+v"(columns.low), "+v"(columns.high));
    return columns;
}

static inline void multiply_add(Sum& sum, const Lanes& weights, const Input& x) {
    const __m512 picked =
        _mm512_maskz_permutex2var_ps((1 << PICKED) - 1, x.low, weights.columns, x.high);
    sum = _mm512_fmadd_ps(weights.values, picked, sum);
}

static inline void stage_block(const Value* x, int64_t columns, X* staged) {
    stage_16(x, columns, staged);
    stage_16(x + 16, columns - 16, staged + 16);
}
