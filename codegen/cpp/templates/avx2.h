// AVX2: blocks of 16 columns in two registers. The 8 values at hand are permuted to the columns
// that a table names for the 8 keep bits, and the other columns are cleared.
#include "x86.h"
#include "orders.h"

constexpr int WIDTH = 16;     // columns of a block
constexpr int INDEX_BITS = 0, KEY_BYTES = 2;
constexpr int SUMS = 4;       // Sums that a thread keeps in registers
constexpr int MAX_BATCH = 4;  // rows of x that share a block of W
using Key = uint16_t;         // the keep bits of a block
using X = float;
struct Lanes { __m256 low, high; };
using Sum = Lanes;
using Part = Sum;
constexpr int ZERO = 0;       // what 0 is staged as

static inline __m256 load(const float* p) { return _mm256_loadu_ps(p); }

static inline __m128i load_halves(const void* p) {
    return _mm_loadu_si128(static_cast<const __m128i*>(p));
}

static inline __m256 load(const bf16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_halves(p)), 16));
}

static inline __m256 load(const fp16* p) { return _mm256_cvtph_ps(load_halves(p)); }

static inline __m256 load(const int8_t* p) {
    const auto* bytes = reinterpret_cast<const __m128i*>(p);
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(bytes)));
}

static inline __m256 load(const Nibbles& p) {
    const __m256i up = _mm256_setr_epi32(28, 24, 20, 16, 12, 8, 4, 0);
    const __m256i words = _mm256_set1_epi32(static_cast<int>(sixteen(p)));
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_sllv_epi32(words, up), 28));
}

static inline __m256 expand_half(int keep, __m256 values) {
    const auto* order = reinterpret_cast<const __m128i*>(ORDERS.order[keep]);
    const __m256i columns = _mm256_cvtepi8_epi32(_mm_loadl_epi64(order));
    const __m256 clear = _mm256_castsi256_ps(_mm256_srai_epi32(columns, 31));
    return _mm256_andnot_ps(clear, _mm256_permutevar8x32_ps(values, columns));
}

static inline Lanes expand(Key keep, Values values) {
    const int low = keep & 255, high = keep >> 8;
    return {expand_half(low, load(values)),
            expand_half(high, load(values + __builtin_popcount(low)))};
}

using Input = const X*;       // a block of x
static inline Input input(const X* x) { return x; }

static inline void multiply_add(Sum& sum, const Lanes& weights, Input x) {
    sum.low = _mm256_fmadd_ps(weights.low, _mm256_loadu_ps(x), sum.low);
    sum.high = _mm256_fmadd_ps(weights.high, _mm256_loadu_ps(x + 8), sum.high);
}

static inline void add_scaled(Part& part, const Sum& sum, float scale) {
    part.low = _mm256_fmadd_ps(sum.low, _mm256_set1_ps(scale), part.low);
    part.high = _mm256_fmadd_ps(sum.high, _mm256_set1_ps(scale), part.high);
}

static inline float total(const Sum& sum) {
    const __m256 eight = _mm256_add_ps(sum.low, sum.high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

static inline void stage_block(const Value* x, int64_t columns, X* staged) {
    if (columns == WIDTH) {
        _mm256_storeu_ps(staged, load(x));
        _mm256_storeu_ps(staged + 8, load(x + 8));
        return;
    }
    for (int64_t c = 0; c < WIDTH; ++c) staged[c] = c < columns ? widen(x + c) : 0;
}
