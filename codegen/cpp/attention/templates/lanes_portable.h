// Any processor: 4 floats at a time in plain C++.
#include "../../templates/scalar.h"

constexpr int WIDTH = 4;        // floats in a register
constexpr int PANEL_LANES = 2;  // registers of rows that a product of tiles keeps side by side
typedef float Vec __attribute__((vector_size(16), may_alias));
typedef int32_t Ints __attribute__((vector_size(16), may_alias));
using Odd = Ints;  // all bits of the lanes that have met a NaN

// The larger of each lane; b where either is NaN.
static inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

static inline void note(Odd& odd, Vec a, Vec b) { odd |= (a != a) | (b != b); }

static inline Vec spoil(Vec x, Odd odd) { return odd ? Vec{} + NAN : x; }

// For |x| < 2^22: adding 1.5 * 2^23 leaves no bits behind the point.
static inline Vec round(Vec x) { return (x + 12582912.f) - 12582912.f; }

// For exponents from -126 on that leave x normal; less gives 0.
static inline Vec times_power_of_2(Vec x, Vec exponent) {
    const Vec shifted = exponent + 12582912.f;
    const Vec scaled = Vec(Ints(x) + (Ints(shifted) << 23));
    const Vec result = exponent < -126.f ? Vec{} : scaled;
    return x == x ? result : x;
}

template <class T>
static inline Vec widen_lanes(const T* p) {
    return Vec{widen(p), widen(p + 1), widen(p + 2), widen(p + 3)};
}
