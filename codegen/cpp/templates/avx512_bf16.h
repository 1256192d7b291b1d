// AVX-512 with BF16 and VBMI2, bfloat16: 32 columns in a register, multiplied and added in pairs by
// vdpbf16ps, which takes numbers below the smallest normal one as zero.
#include "x86.h"

constexpr int WIDTH = 32;     // columns of a block
constexpr int INDEX_BITS = 0, KEY_BYTES = 4;
constexpr int SUMS = 16;      // Sums that a thread keeps in registers
constexpr int MAX_BATCH = 8;  // rows of x that share a block of W
using Key = uint32_t;         // the keep bits of a block
using X = bf16;
using Lanes = __m512i;
using Sum = __m512;

template <int COUNT>
static inline __m512i load(const bf16* p) {
    const auto* words = reinterpret_cast<const __m256i*>(p);
    if constexpr (COUNT == 32) return _mm512_loadu_si512(p);
    if constexpr (COUNT == 16) return _mm512_zextsi256_si512(_mm256_loadu_si256(words));
    return _mm512_maskz_loadu_epi16((1u << COUNT) - 1, p);
}

static inline Lanes expand(Key keep, const Value* values) {
    __m512i at_hand = load<N ? WIDTH * N / M : WIDTH>(values);
    asm("" : "+v"(at_hand));  // in a register: vpexpandw from memory is microcoded on Zen 4
    return _mm512_maskz_expand_epi16(keep, at_hand);
}

static inline void multiply_add(Sum& sum, Lanes weights, const X* x) {
    sum = _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)_mm512_loadu_si512(x));
}

static inline float total(Sum sum) { return _mm512_reduce_add_ps(sum); }

static inline void stage_block(const Value* x, int64_t columns, X* staged) {
    const __mmask32 inside = _bzhi_u32(~0u, static_cast<uint32_t>(columns));
    _mm512_storeu_si512(staged, _mm512_maskz_loadu_epi16(inside, x));
}
