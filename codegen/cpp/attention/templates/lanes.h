// What every instruction set does alike with registers of WIDTH floats.
constexpr float NEVER = -INFINITY;
constexpr float LOG2_E = 1.44269504f;

static inline Vec load(const float* p) {
    Vec x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

static inline void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }

static inline Vec splat(float x) { return Vec{} + x; }

static inline Vec widen_lanes(const float* p) { return load(p); }

// The larger of each lane; NaN where either is NaN.
static inline Vec larger_or_nan(Vec a, Vec b) {
    Odd odd{};
    note(odd, a, b);
    return spoil(larger(a, b), odd);
}

static inline float larger_or_nan(float a, float b) {
    return a != a || b != b ? NAN : a > b ? a : b;
}

// -inf as 0: what is subtracted from the scores of a row that has seen no key.
static inline Vec finite(Vec top) { return top == NEVER ? Vec{} : top; }

// e^x for x <= 0, relative error 1e-7 + |x| * 6e-8: 2^(n + f) with whole n, |f| <= 1/2, and for 2^f
// the polynomial of degree 6 with the smallest relative error that is 1 at 0.
static inline Vec exponential(Vec x) {
    const Vec t = larger(splat(-200), x * LOG2_E);
    const Vec n = round(t), f = t - n;
    Vec p = splat(0.00015353362f);
    p = p * f + 0.00133988739f;
    p = p * f + 0.00961843692f;
    p = p * f + 0.0555033237f;
    p = p * f + 0.240226477f;
    p = p * f + 0.693147182f;
    return times_power_of_2(p * f + 1, n);
}

// Sums of neighbours: those of a in the lower half, those of b in the upper half.
static inline Vec add_pairs(Vec a, Vec b) {
    Ints even, odd;
    for (int i = 0; i < WIDTH; ++i) {
        even[i] = 2 * i;
        odd[i] = 2 * i + 1;
    }
    return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
}

// Lane i: the sum over the lanes of x[i]. Destroys x.
static inline Vec totals(Vec (&x)[WIDTH]) {
#pragma GCC unroll 4
    for (int count = WIDTH / 2; count; count /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < count; ++i) x[i] = add_pairs(x[2 * i], x[2 * i + 1]);
    return x[0];
}

static inline float add_lanes(Vec x) {
    float sum = 0;
    for (int i = 0; i < WIDTH; ++i) sum += x[i];
    return sum;
}

static inline int64_t add_lanes(Ints x) {
    int64_t sum = 0;
    for (int i = 0; i < WIDTH; ++i) sum += x[i];
    return sum;
}

// The largest of `count` floats, a multiple of WIDTH; NaN if one is.
static inline float maximum(const float* x, int64_t count) {
    Vec best = splat(NEVER);
    Odd odd{};
    for (int64_t i = 0; i < count; i += WIDTH) {
        const Vec next = load(x + i);
        note(odd, next, next);
        best = larger(best, next);
    }
    best = spoil(best, odd);
    float result = NEVER;
    for (int i = 0; i < WIDTH; ++i) result = larger_or_nan(result, best[i]);
    return result;
}

// x becomes e^(x - top), `count` floats, a multiple of WIDTH; returns their sum.
static inline float exponentials(float* x, int64_t count, float top) {
    const float base = top == NEVER ? 0 : top;
    Vec sum{};
    for (int64_t i = 0; i < count; i += WIDTH) {
        const Vec weight = exponential(load(x + i) - base);
        store(x + i, weight);
        sum += weight;
    }
    return add_lanes(sum);
}

// x[i][j] <-> x[j][i]: each round interleaves the upper half of the rows with the lower one.
static inline void transpose(Vec (&x)[WIDTH]) {
    Ints low, high;
    for (int i = 0; i < WIDTH; ++i) {
        low[i] = i / 2 + i % 2 * WIDTH;
        high[i] = low[i] + WIDTH / 2;
    }
#pragma GCC unroll 4
    for (int round = 1; round < WIDTH; round *= 2) {
        Vec y[WIDTH];
#pragma GCC unroll 8
        for (int i = 0; i < WIDTH / 2; ++i) {
            y[2 * i] = __builtin_shuffle(x[i], x[i + WIDTH / 2], low);
            y[2 * i + 1] = __builtin_shuffle(x[i], x[i + WIDTH / 2], high);
        }
        std::memcpy(x, y, sizeof y);
    }
}

static inline Vec widen_lanes(const uint8_t* p) {
    typedef uint8_t Bytes __attribute__((vector_size(WIDTH)));
    Bytes bytes;
    std::memcpy(&bytes, p, sizeof bytes);
    return __builtin_convertvector(bytes, Vec);
}

// One row of `count` values as floats.
template <class T>
static inline void widen_row(const T* from, float* to, int64_t count) {
    int64_t i = 0;
    for (; i + WIDTH <= count; i += WIDTH) store(to + i, widen_lanes(from + i));
    for (; i < count; ++i) to[i] = widen(from + i);
}
