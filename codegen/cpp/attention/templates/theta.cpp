// Top-Theta attention on CPU: scores (or probabilities) that do not exceed a threshold of their
// head and row length are dropped. With one query only the rows of V that a head keeps are read;
// with more, a first sweep finds each row's maximum, sum and length, and a second one weighs the
// values. Scores and sums are float32 for any Value.
//
// The default specialisation below lets this file compile as it is. A generated kernel is this file
// with another specialisation: types, constants and the instruction set's registers.
#include "prelude.h"

// begin specialisation
using Value = float;
using MaskValue = uint8_t;     // uint8_t (0 = not seen) or float (added)
constexpr bool MASKED = true;  // whether there is a mask
constexpr int DIM = 64;        // of q, k and v
constexpr int BLOCK_Q = 64, BLOCK_K = 64;
constexpr bool BLOCK = false;
#include "lanes_portable.h"
// end specialisation

#include "lanes.h"

#include "problem.h"

constexpr int EXTRA_ROWS = DIM + BLOCK_K + 6;  // of floats, for `ThetaWork`
#include "tile.h"

#include "decode.h"

enum Denominator { EXACT, EXP_THRESHOLD, OFFLINE, NONE };

// table[h] at a row length, linear between the known ones, constant beyond them.
static float at_length(const Problem& p, const float* table, int64_t h, int64_t count) {
    const int64_t* end = p.lengths + p.points;
    const int64_t after = std::lower_bound(p.lengths, end, count) - p.lengths;
    const int64_t upper = std::min(std::max<int64_t>(after, 1), p.points - 1);
    const int64_t lower = std::max<int64_t>(upper - 1, 0), start = p.lengths[lower];
    const float span = float(std::max<int64_t>(p.lengths[upper] - start, 1));
    const float share = std::min(1.f, std::max(0.f, float(count - start) / span));
    const float first = table[h * p.points + lower], second = table[h * p.points + upper];
    return first + share * (second - first);
}

// What decides about the elements of a row, once its maximum, sum and visible keys are known. A row
// whose softmax is NaN, because its maximum is NaN or +inf, keeps all, so that it stays NaN.
struct Rule {
    float base, limit;  // what exponents are relative to; the threshold
    float unit;         // e^(score - base) times this is the probability
    Rule(const Problem& p, int64_t h, float top, float total, int64_t count)
        : base(top == NEVER ? 0 : top),
          limit(count <= p.topk || !(top < INFINITY) ? NEVER : at_length(p, p.theta, h, count)),
          unit(total == 0 ? 1 : 1 / total) {}
};

// Which visible elements stay: those whose score or probability exceeds the limit, or is NaN. None
// exceeds a limit that is NaN.
static inline Ints stays(Vec score, Vec compared, Vec limit) {
    return (score != NEVER) & ((compared > limit) | (compared != compared));
}

// What the kept weights are divided by.
static float denominator(const Problem& p, int64_t h, const Rule& rule, float total, float kept,
                         int64_t count, int64_t dropped) {
    float sum = total;
    if (!p.is_post && p.denominator != EXACT) {
        sum = kept;
        if (dropped && p.denominator == EXP_THRESHOLD)
            sum += float(dropped) * std::exp(rule.limit - rule.base);
        if (dropped && p.denominator == OFFLINE) sum += at_length(p, p.lost, h, count);
    }
    return sum == 0 ? 1 : sum;
}

#include "theta_rows.h"

#include "theta_decode.h"

#include "entry.h"
