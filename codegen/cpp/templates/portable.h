// Any processor: blocks of 16 columns in plain C++, which the compiler vectorises as it can.
#include "scalar.h"

constexpr int WIDTH = 16;     // columns of a block
constexpr int INDEX_BITS = 0, KEY_BYTES = 2;
constexpr int SUMS = 2;       // Sums that a thread keeps in registers
constexpr int MAX_BATCH = 4;  // rows of x that share a block of W
using Key = uint16_t;         // the keep bits of a block
using X = float;
typedef float Quad __attribute__((vector_size(16)));
struct Lanes { Quad quad[4]; };
using Sum = Lanes;
using Part = Sum;
constexpr int ZERO = 0;        // what 0 is staged as

static inline Lanes expand(Key keep, Values values) {
    Lanes lanes = {};
    for (; keep; keep &= keep - 1, values += 1) {
        const int column = __builtin_ctz(keep);
        lanes.quad[column / 4][column % 4] = widen(values);
    }
    return lanes;
}

using Input = const X*;       // a block of x
static inline Input input(const X* x) { return x; }

static inline void multiply_add(Sum& sum, const Lanes& weights, Input x) {
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
        Quad part;
        std::memcpy(&part, x + 4 * q, sizeof part);
        sum.quad[q] += weights.quad[q] * part;
    }
}

static inline void add_scaled(Part& part, const Sum& sum, float scale) {
    for (int q = 0; q < 4; ++q) part.quad[q] += sum.quad[q] * scale;
}

static inline float total(const Sum& sum) {
    const Quad quad = (sum.quad[0] + sum.quad[1]) + (sum.quad[2] + sum.quad[3]);
    return (quad[0] + quad[1]) + (quad[2] + quad[3]);
}

static inline void stage_block(const Value* x, int64_t columns, X* staged) {
    for (int64_t c = 0; c < WIDTH; ++c) staged[c] = c < columns ? widen(x + c) : 0;
}
