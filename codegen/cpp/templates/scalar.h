// Numbers of 16 bits and float32 on any processor.
static inline float widen(const float* p) { return *p; }

static inline float widen(const bf16* p) {
    const uint32_t word = uint32_t(p->bits) << 16;
    float wide;
    std::memcpy(&wide, &word, sizeof wide);
    return wide;
}

static inline float widen(const fp16* p) {
    const uint32_t sign = uint32_t(p->bits & 0x8000u) << 16;
    const uint32_t exponent = p->bits >> 10 & 31, fraction = p->bits & 1023;
    if (exponent == 0) return std::copysign(std::ldexp(float(fraction), -24), sign ? -1.f : 1.f);
    const uint32_t word = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;
    float wide;
    std::memcpy(&wide, &word, sizeof wide);
    return wide;
}

static inline void narrow(float wide, float* p) { *p = wide; }

static inline void narrow(float wide, bf16* p) {
    uint32_t word;
    std::memcpy(&word, &wide, sizeof word);
    const uint32_t even = 0x7FFF + (word >> 16 & 1);  // round half to even
    p->bits = std::isnan(wide) ? 0x7FC0 : (word + even) >> 16;
}

static inline void narrow(float wide, fp16* p) {
    const uint16_t sign = std::signbit(wide) ? 0x8000 : 0;
    const float size = std::fabs(wide);
    if (std::isnan(wide)) p->bits = 0x7E00;
    else if (size >= 65520.f) p->bits = sign | 0x7C00;
    else if (size < 0x1p-14f) p->bits = sign | uint16_t(std::nearbyint(size * 0x1p24f));
    else {
        uint32_t word;
        std::memcpy(&word, &size, sizeof word);
        word += 0xFFF + (word >> 13 & 1);  // round half to even
        p->bits = sign | uint16_t((word >> 13) - (112u << 10));
    }
}
