// AVX-512 with BF16 and VBMI2, bfloat16: 32 columns in a register, multiplied and added in pairs by
// vdpbf16ps, which takes numbers below the smallest normal one as zero.
#include "x86.h"

constexpr int WIDTH = 32;     // columns of a block
constexpr int INDEX_BITS = 0, KEY_BYTES = 4;
constexpr int SUMS = 24;      // Sums that a thread keeps in registers
constexpr int MAX_BATCH = 8;  // rows of x that share a block of W
using Key = uint32_t;         // the keep bits of a block
using X = bf16;
using Lanes = __m512i;
using Sum = __m512;
using Part = Sum;
constexpr int ZERO = 0;       // what 0 is staged as

template <int COUNT>
static inline __m512i load(const bf16* p) {
    const auto* words = reinterpret_cast<const __m256i*>(p);
    if constexpr (COUNT == 32) return _mm512_loadu_si512(p);
    if constexpr (COUNT == 16) return _mm512_zextsi256_si512(_mm256_loadu_si256(words));
    return _mm512_maskz_loadu_epi16((1u << COUNT) - 1, p);
}

static inline __m512 widened_16(const int8_t* p) {
    const auto* bytes = reinterpret_cast<const __m128i*>(p);
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes)));
}

template <int COUNT>
static inline __m512i load(const int8_t* p) {
    const __m512 high = COUNT > 16 ? widened_16(p + 16) : _mm512_setzero_ps();
    return (__m512i)_mm512_cvtne2ps_pbh(high, widened_16(p));  // exact
}

struct Numbers {  // as bfloat16, for a code of 4 bits and whatever bit lies above them
    uint16_t bits[32];
    constexpr Numbers() : bits() {
        for (int i = 0; i < 32; ++i) {
            const int code = i % 16 < 8 ? i % 16 : i % 16 - 16, size = code < 0 ? -code : code;
            const int power = size < 2 ? 0 : size < 4 ? 1 : size < 8 ? 2 : 3;
            const int fraction = (size << 7 >> power) - 128;
            bits[i] = size ? (code < 0) << 15 | (127 + power) << 7 | fraction : 0;
        }
    }
};
alignas(64) static constexpr Numbers NUMBERS;

template <int COUNT>
static inline __m512i load(const Nibbles& p) {
    const int64_t high = COUNT > 16 ? sixteen(p + 16) : 0;
    const __m128i pairs = _mm_set_epi64x(high, sixteen(p));
    const __m256i twice = _mm256_set_m128i(_mm_unpackhi_epi8(pairs, pairs),
                                           _mm_unpacklo_epi8(pairs, pairs));
    const __m512i codes = _mm512_srlv_epi16(_mm512_cvtepu8_epi16(twice),
                                            _mm512_set1_epi32(4 << 16));  // each second by 4
    return _mm512_permutexvar_epi16(codes, _mm512_load_si512(&NUMBERS));
}

static inline Lanes expand(Key keep, Values values) {
    __m512i at_hand = load<N ? WIDTH * N / M : WIDTH>(values);
    asm("" : "+v"(at_hand));  // in a register: vpexpandw from memory is microcoded on Zen 4
    return _mm512_maskz_expand_epi16(keep, at_hand);
}

using Input = __m512i;        // a block of x
static inline Input input(const X* x) {
    Input columns = _mm512_loadu_si512(x);
    asm("" : "+v"(columns));  // in a register: g++ would read it once for each row of W
    return columns;
}

static inline void multiply_add(Sum& sum, Lanes weights, Input x) {
    sum = _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)x);
}

static inline void add_scaled(Part& part, Sum sum, float scale) {
    part = _mm512_fmadd_ps(sum, _mm512_set1_ps(scale), part);
}

static inline float total(Sum sum) { return _mm512_reduce_add_ps(sum); }

static inline void stage_block(const Value* x, int64_t columns, X* staged) {
    const __mmask32 inside = _bzhi_u32(~0u, static_cast<uint32_t>(columns));
    _mm512_storeu_si512(staged, _mm512_maskz_loadu_epi16(inside, x));
}
