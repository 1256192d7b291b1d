// AVX2: 8 floats in a register.
#include "../../templates/x86.h"

constexpr int WIDTH = 8;        // floats in a register
constexpr int PANEL_LANES = 2;  // registers of rows that a product of tiles keeps side by side
typedef float Vec __attribute__((vector_size(32), may_alias));
typedef int32_t Ints __attribute__((vector_size(32), may_alias));
using Odd = __m256;  // all bits of the lanes that have met a NaN

// The larger of each lane; b where either is NaN.
static inline Vec larger(Vec a, Vec b) { return Vec(_mm256_max_ps(a, b)); }

static inline void note(Odd& odd, Vec a, Vec b) {
    odd = _mm256_or_ps(odd, _mm256_cmp_ps(a, b, _CMP_UNORD_Q));
}

static inline Vec spoil(Vec x, Odd odd) {
    return Vec(_mm256_blendv_ps(x, _mm256_set1_ps(NAN), odd));
}

static inline Vec round(Vec x) {
    return Vec(_mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// For exponents from -126 on that leave x normal; less gives 0.
static inline Vec times_power_of_2(Vec x, Vec exponent) {
    const __m256i bits = _mm256_slli_epi32(_mm256_cvtps_epi32(exponent), 23);
    const __m256i scaled = _mm256_add_epi32(_mm256_castps_si256(x), bits);
    const __m256 normal = _mm256_cmp_ps(exponent, _mm256_set1_ps(-126), _CMP_NLT_UQ);
    const __m256 result = _mm256_and_ps(_mm256_castsi256_ps(scaled), normal);
    return Vec(_mm256_blendv_ps(result, x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
}

static inline Vec widen_lanes(const bf16* p) {
    const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return Vec(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
}

static inline Vec widen_lanes(const fp16* p) {
    return Vec(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
