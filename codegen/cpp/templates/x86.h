// What AVX2 and AVX-512 share.
#include <immintrin.h>

static inline float widen(const float* p) { return *p; }

static inline float widen(const bf16* p) {
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(int(uint32_t(p->bits) << 16))));
}

static inline float widen(const fp16* p) { return _cvtsh_ss(p->bits); }

static inline void narrow(float wide, float* p) { *p = wide; }

static inline void narrow(float wide, bf16* p) {
    const uint32_t word = _mm_cvtsi128_si32(_mm_castps_si128(_mm_set_ss(wide)));
    const uint32_t even = 0x7FFF + (word >> 16 & 1);  // round half to even
    p->bits = std::isnan(wide) ? 0x7FC0 : (word + even) >> 16;
}

static inline void narrow(float wide, fp16* p) {
    p->bits = _cvtss_sh(wide, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
