// AVX-512: 16 floats in a register.
#include "../../templates/x86.h"

constexpr int WIDTH = 16;       // floats in a register
constexpr int PANEL_LANES = 4;  // registers of rows that a product of tiles keeps side by side
typedef float Vec __attribute__((vector_size(64), may_alias));
typedef int32_t Ints __attribute__((vector_size(64), may_alias));
using Odd = __mmask16;  // which lanes have met a NaN

// The larger of each lane; b where either is NaN.
static inline Vec larger(Vec a, Vec b) { return Vec(_mm512_max_ps(a, b)); }

static inline void note(Odd& odd, Vec a, Vec b) {
    odd |= _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q);
}

static inline Vec spoil(Vec x, Odd odd) {
    return Vec(_mm512_mask_blend_ps(odd, x, _mm512_set1_ps(NAN)));
}

static inline Vec round(Vec x) { return Vec(_mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT)); }

static inline Vec times_power_of_2(Vec x, Vec exponent) {
    return Vec(_mm512_scalef_ps(x, exponent));
}

static inline Vec widen_lanes(const bf16* p) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return Vec(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}

static inline Vec widen_lanes(const fp16* p) {
    return Vec(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
