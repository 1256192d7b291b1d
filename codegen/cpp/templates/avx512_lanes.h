// AVX-512: 16 floats in a register.
#include "x86.h"

constexpr int MAX_BATCH = 8;  // rows of x that share a block of W
using X = float;
using Sum = __m512;
using Part = Sum;
constexpr int ZERO = 0;       // what 0 is staged as

template <int COUNT>
static inline __m512 load(const float* p) {
    if constexpr (COUNT == 16) return _mm512_loadu_ps(p);
    if constexpr (COUNT == 8) return _mm512_zextps256_ps512(_mm256_loadu_ps(p));
    if constexpr (COUNT == 4) return _mm512_zextps128_ps512(_mm_loadu_ps(p));
    return _mm512_maskz_loadu_ps((1 << COUNT) - 1, p);
}

template <int COUNT>
static inline __m256i load_halves(const void* p) {
    const auto* words = static_cast<const __m128i*>(p);
    if constexpr (COUNT == 16) return _mm256_loadu_si256(static_cast<const __m256i*>(p));
    if constexpr (COUNT == 8) return _mm256_zextsi128_si256(_mm_loadu_si128(words));
    if constexpr (COUNT == 4) return _mm256_zextsi128_si256(_mm_loadl_epi64(words));
    return _mm256_maskz_loadu_epi16((1 << COUNT) - 1, p);
}

template <int COUNT>
static inline __m512 load(const bf16* p) {
    const __m512i words = _mm512_cvtepu16_epi32(load_halves<COUNT>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
}

template <int COUNT>
static inline __m512 load(const fp16* p) {
    return _mm512_cvtph_ps(load_halves<COUNT>(p));
}

// Codes are read 16 at a time, however few of them are meant.
template <int>
static inline __m512 load(const int8_t* p) {
    const auto* bytes = reinterpret_cast<const __m128i*>(p);
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes)));
}

template <int>
static inline __m512 load(const Nibbles& p) {
    const uint64_t codes = sixteen(p);
    const __m512i low = _mm512_set1_epi32(static_cast<int>(codes));
    const __m512i words = _mm512_mask_set1_epi32(low, 0xFF00, static_cast<int>(codes >> 32));
    const __m512i up = _mm512_setr_epi32(28, 24, 20, 16, 12, 8, 4, 0, 28, 24, 20, 16, 12, 8, 4, 0);
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_sllv_epi32(words, up), 28));
}

static inline void add_scaled(Part& part, Sum sum, float scale) {
    part = _mm512_fmadd_ps(sum, _mm512_set1_ps(scale), part);
}

static inline float total(Sum sum) { return _mm512_reduce_add_ps(sum); }

static inline void stage_16(const Value* x, int64_t columns, X* staged) {
    if (columns >= 16) return _mm512_storeu_ps(staged, load<16>(x));
    for (int64_t c = 0; c < 16; ++c) staged[c] = c < columns ? widen(x + c) : 0;
}
