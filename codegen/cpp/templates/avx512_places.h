// AVX-512 with VBMI2, few values kept: the columns of the values of a block are listed by
// compressing 0, 1, 2, ... by the keep bits, and 16 values at a time pick theirs of x. Where at most
// 16 are kept in a block, one round does. Columns that hold no value are not read: NaN or infinity
// there does not reach y.
#include "avx512_lanes.h"

constexpr int SUMS = 16;  // Sums that a thread keeps in registers
constexpr int INDEX_BITS = 0, KEY_BYTES = WIDTH / 8;  // WIDTH is 32 or 64
struct Lanes {  // the first 16 values, and where the others are
    __m512 values;
    __m512i columns;
    __mmask16 filled;
    Key keep;
    Values from;
};

struct Iota {
    uint8_t place[64];
    constexpr Iota() : place() {
        for (int column = 0; column < 64; ++column) place[column] = column;
    }
};
alignas(64) static constexpr Iota IOTA;

static inline __mmask16 first(int count) { return _bzhi_u32(0xFFFF, count); }

static inline __m512 load_first(const float* p, __mmask16 filled) {
    return _mm512_maskz_loadu_ps(filled, p);
}

static inline __m512 load_first(const fp16* p, __mmask16 filled) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(filled, p));
}

static inline __m512 load_first(const int8_t* p, __mmask16 filled) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(filled, p)));
}

static inline __m512 load_first(const Nibbles& p, __mmask16) { return load<16>(p); }

static inline __m512i columns_of(Key keep) {
    const __m512i iota = _mm512_load_si512(&IOTA);
    if constexpr (WIDTH == 64) return _mm512_maskz_compress_epi8(keep, iota);
    return _mm512_castsi256_si512(
        _mm256_maskz_compress_epi8(keep, _mm512_castsi512_si256(iota)));
}

static inline __m512i widened_16(__m512i columns) {
    return _mm512_cvtepu8_epi32(_mm512_castsi512_si128(columns));
}

static inline Lanes expand(Key keep, Values values) {
    const __mmask16 filled = first(__builtin_popcountll(keep));
    return {load_first(values, filled), widened_16(columns_of(keep)), filled, keep, values};
}

static inline __m512 pick(__m512i columns, const X* x) {
    const __m512 low = _mm512_permutex2var_ps(_mm512_loadu_ps(x), columns, _mm512_loadu_ps(x + 16));
    if constexpr (WIDTH == 32) return low;
    const __m512 high =
        _mm512_permutex2var_ps(_mm512_loadu_ps(x + 32), columns, _mm512_loadu_ps(x + 48));
    const __mmask16 is_high = _mm512_test_epi32_mask(columns, _mm512_set1_epi32(32));
    return _mm512_mask_blend_ps(is_high, low, high);
}

static inline void add_rest(Sum& sum, const Lanes& weights, const X* x) {
    __m512i columns = columns_of(weights.keep);
    Values values = weights.from;
    for (int left = __builtin_popcountll(weights.keep) - 16; left > 0; left -= 16) {
        columns = _mm512_alignr_epi64(columns, columns, 2);
        values += 16;
        const __m512 more = load_first(values, first(left));
        sum = _mm512_mask3_fmadd_ps(more, pick(widened_16(columns), x), sum, first(left));
    }
}

using Input = const X*;       // a block of x
static inline Input input(const X* x) { return x; }

static inline void multiply_add(Sum& sum, const Lanes& weights, Input x) {
    sum = _mm512_mask3_fmadd_ps(weights.values, pick(weights.columns, x), sum, weights.filled);
    if (__builtin_expect(__builtin_popcountll(weights.keep) > 16, 0)) add_rest(sum, weights, x);
}

static inline void stage_block(const Value* x, int64_t columns, X* staged) {
    for (int64_t c = 0; c < WIDTH; c += 16) stage_16(x + c, columns - c, staged + c);
}
