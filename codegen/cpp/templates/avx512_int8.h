// AVX-512 with VNNI and VBMI2, int8 by int8: 64 columns in a register. vpdpbusd takes unsigned by
// signed bytes, so x is staged with 128 added; the same with zeros for x is taken off in the end.
#include "x86.h"

constexpr int WIDTH = 64;     // columns of a block
constexpr int INDEX_BITS = 0, KEY_BYTES = 8;
constexpr int SUMS = 16;      // Sums that a thread keeps in registers
constexpr int MAX_BATCH = 8;  // rows of x that share a block of W
constexpr int ZERO = 128;     // what 0 is staged as
using Key = uint64_t;         // the keep bits of a block
using X = uint8_t;
using Lanes = __m512i;
using Sum = __m512i;
using Part = __m512;

template <int COUNT>
static inline __m512i load(const int8_t* p) {
    const auto* half = reinterpret_cast<const __m256i*>(p);
    if constexpr (COUNT == 64) return _mm512_loadu_si512(p);
    if constexpr (COUNT == 32) return _mm512_zextsi256_si512(_mm256_loadu_si256(half));
    return _mm512_maskz_loadu_epi8((1ull << COUNT) - 1, p);
}

static inline Lanes expand(Key keep, Values values) {
    __m512i at_hand = load<N ? WIDTH * N / M : WIDTH>(values);
    asm("" : "+v"(at_hand));  // in a register: vpexpandb from memory is microcoded on Zen 4
    return _mm512_maskz_expand_epi8(keep, at_hand);
}

using Input = __m512i;        // a block of x
static inline Input input(const X* x) {
    Input columns = _mm512_loadu_si512(x);
    asm("" : "+v"(columns));  // in a register: g++ would read it once for each row of W
    return columns;
}

static inline void multiply_add(Sum& sum, Lanes weights, Input x) {
    sum = _mm512_dpbusd_epi32(sum, x, weights);
}

static inline void add_zeros(Sum& sum, Lanes weights) {
    sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(static_cast<char>(ZERO)), weights);
}

static inline void add_scaled(Part& part, Sum sum, float scale) {
    part = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(scale), part);
}

static inline Sum without(Sum sum, Sum offset) { return _mm512_sub_epi32(sum, offset); }

static inline float total(Part part) { return _mm512_reduce_add_ps(part); }
