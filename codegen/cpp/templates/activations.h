// Activations without a branch or a call, so that the compiler computes a register of them at once.
// Their errors are about those of float32: 2e-7 of the largest result.

// 2^n * e^r, with r = x - n ln 2, by its series. NaN stays NaN; 0 below is 2e-38.
static inline float exponential(float x) {
    x = x < -87.f ? -87.f : x;
    x = x > 89.f ? 89.f : x;  // n = 128: infinity
    const float shifted = x * 1.44269504f + 12582912.f;  // 1.5 * 2^23: rounds, n in the low bits
    int32_t n;
    std::memcpy(&n, &shifted, sizeof n);
    const float whole = shifted - 12582912.f;
    const float r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float series = 1.98756915e-4f;
    series = series * r + 1.39819995e-3f;
    series = series * r + 8.33345190e-3f;
    series = series * r + 4.16657960e-2f;
    series = series * r + 1.66666650e-1f;
    series = series * r + 5.00000010e-1f;
    series = series * r * r + r + 1.f;
    const uint32_t power = uint32_t(n + 127) << 23;
    float scale;
    std::memcpy(&scale, &power, sizeof scale);
    return series * scale;
}

static inline float silu(float x) { return x / (1 + exponential(-x)); }

// Abramowitz and Stegun 7.1.26; erf is odd.
static inline float gelu(float x) {
    const float z = std::fabs(x) * 0.70710678f;
    const float t = 1 / (1 + 0.3275911f * z);
    float tail = 1.061405429f;
    tail = tail * t - 1.453152027f;
    tail = tail * t + 1.421413741f;
    tail = tail * t - 0.284496736f;
    tail = tail * t + 0.254829592f;
    tail = tail * t * exponential(-z * z);  // 1 - erf(z)
    return 0.5f * x * (x < 0 ? tail : 2 - tail);
}

static inline float gelu_tanh(float x) {  // 0.5 (1 + tanh(z)) = 1 / (1 + e^-2z)
    return x / (1 + exponential(-1.59576912f * (x + 0.044715f * x * x * x)));
}
