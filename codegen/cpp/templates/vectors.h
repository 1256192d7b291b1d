// Registers of FLOATS floats whatever the instruction set, and squares of them turned over.
#if defined(__AVX512F__)
constexpr int FLOATS = 16;
#elif defined(__AVX2__)
constexpr int FLOATS = 8;
#else
constexpr int FLOATS = 4;
#endif
typedef float Vector __attribute__((vector_size(4 * FLOATS)));
typedef int32_t Ints __attribute__((vector_size(4 * FLOATS)));
typedef uint16_t Halves __attribute__((vector_size(2 * FLOATS)));

static inline Vector splat(float value) { return value - Vector{}; }

template <typename To, typename From>
static inline To loaded(const From* p) {
    To vector;
    std::memcpy(&vector, p, sizeof vector);
    return vector;
}

static inline void stored(const Vector& vector, float* p) {
    std::memcpy(p, &vector, sizeof vector);
}

static inline Vector widened(const float* p) { return loaded<Vector>(p); }

static inline Vector widened(const bf16* p) {
    const Ints words = __builtin_convertvector(loaded<Halves>(p), Ints) << 16;
    return loaded<Vector>(&words);
}

static inline Vector widened(const fp16* p) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    Vector vector;
    for (int i = 0; i < FLOATS; ++i) vector[i] = widen(p + i);
    return vector;
#endif
}

static inline Vector widened(const int8_t* p) {
    typedef int8_t Codes __attribute__((vector_size(FLOATS)));
    return __builtin_convertvector(loaded<Codes>(p), Vector);
}

static inline Vector widened(const Nibbles& p) {
    Vector vector;
    for (int i = 0; i < FLOATS; ++i) vector[i] = widen(p + i);
    return vector;
}

// acc + weight * x; of PAIRS, both halves of a lane are numbers of 16 bits and both products count.
template <bool PAIRS>
static inline void add_product(Vector& acc, const Vector& weight, const Vector& x) {
#ifdef __AVX512BF16__
    if constexpr (PAIRS) {
        acc = _mm512_dpbf16_ps(acc, (__m512bh)weight, (__m512bh)x);
        return;
    }
#endif
    acc += weight * x;
}

// The high halves of a and b in the low and high halves of each lane.
static inline Vector paired(const Vector& a, const Vector& b) {
    typedef uint32_t Words __attribute__((vector_size(4 * FLOATS)));
    const Words both = loaded<Words>(&a) >> 16 | loaded<Words>(&b);
    return loaded<Vector>(&both);
}

// Row i, lane j becomes row j, lane i, by exchanging halves of ever smaller squares.
template <int HALF = FLOATS / 2>
static inline void transpose(Vector (&rows)[FLOATS]) {
    Ints low, high;
#pragma GCC unroll 16
    for (int lane = 0; lane < FLOATS; ++lane) {
        low[lane] = lane & HALF ? lane - HALF + FLOATS : lane;
        high[lane] = lane & HALF ? lane + FLOATS : lane + HALF;
    }
#pragma GCC unroll 16
    for (int i = 0; i < FLOATS; ++i) {
        if (i & HALF) continue;
        const Vector a = rows[i], b = rows[i + HALF];
        rows[i] = __builtin_shuffle(a, b, low);
        rows[i + HALF] = __builtin_shuffle(a, b, high);
    }
    if constexpr (HALF > 1) transpose<HALF / 2>(rows);
}

// square[column][row] of `rows` by `columns` of x [row][column], zero beyond them.
static inline void turned(const Value* x, int64_t stride, int64_t rows, int64_t columns,
                          Vector (&square)[FLOATS]) {
    if (columns >= FLOATS) {
#pragma GCC unroll 16
        for (int row = 0; row < FLOATS; ++row)
            square[row] = row < rows ? widened(x + row * stride) : Vector{};
    } else {
        float lines[FLOATS][FLOATS] = {};
        for (int64_t row = 0; row < std::min<int64_t>(rows, FLOATS); ++row)
            for (int64_t c = 0; c < std::min<int64_t>(columns, FLOATS); ++c)
                lines[row][c] = widen(x + row * stride + c);
        for (int row = 0; row < FLOATS; ++row) square[row] = loaded<Vector>(lines[row]);
    }
    transpose(square);
}
