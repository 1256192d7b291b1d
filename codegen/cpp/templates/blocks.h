// Blocks with many rows of x: HEIGHT rows of a block meet VECTORS registers of rows of x, all sums in
// registers for as long as the tile has blocks of that row of blocks.
constexpr int HEIGHT = BLOCK_ROWS % SIDE == 0 ? SIDE : BLOCK_ROWS % 2 == 0 ? 2 : 1;
constexpr int64_t BAND_UNIT = std::lcm(int64_t(FLOATS), int64_t(BLOCK_ROWS));
constexpr int64_t TILE_UNIT = std::lcm(int64_t(64), int64_t(BLOCK_COLS));

constexpr int STEP = PAIRS ? 2 : 1;  // columns of a staged register

static inline float number_at(const Value* w) {
    if constexpr (PAIRS) return loaded<float>(w);
    else return widen(w);
}

// sums[row][lane] += W . x for rows [row, row + HEIGHT) of the blocks [first, last), where x is that
// of column 0.
template <int VECTORS>
static inline void meet_blocks(const Weight& weight, int64_t first, int64_t last, int64_t row,
                               const float* x, float* sums) {
    constexpr int64_t LANES = VECTORS * FLOATS;
    Vector acc[HEIGHT][VECTORS];
#pragma GCC unroll 4
    for (int r = 0; r < HEIGHT; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v)
            acc[r][v] = loaded<Vector>(sums + r * LANES + v * FLOATS);
    for (int64_t block = first; block < last; ++block) {
        const Value* w = weight.values + (block * BLOCK_ROWS + row) * BLOCK_COLS;
        const float* column = x + int64_t(weight.columns[block]) * (BLOCK_COLS / STEP) * LANES;
        for (int c = 0; c < BLOCK_COLS; c += STEP, column += LANES)
#pragma GCC unroll 4
            for (int r = 0; r < HEIGHT; ++r) {
                const Vector one = splat(number_at(w + r * BLOCK_COLS + c));
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; ++v)
                    add_product<PAIRS>(acc[r][v], one, loaded<Vector>(column + v * FLOATS));
            }
    }
#pragma GCC unroll 4
    for (int r = 0; r < HEIGHT; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) stored(acc[r][v], sums + r * LANES + v * FLOATS);
}

// What a worker writes to.
struct Desk {
    float* sums;  // [batches][height][lanes]
    int64_t top, height;  // rows of W
    int64_t next[(BAND + BAND_UNIT) / BLOCK_ROWS + 1];  // block of each row of blocks

    static int64_t room_of(const Cut&) { return 0; }
    void take_room(const Cut&, float*) {}

    void begin(const Weight& weight, int64_t first, int64_t rows) {
        top = first;
        height = rows;
        for (int64_t r = 0; r < rows; r += BLOCK_ROWS)
            next[r / BLOCK_ROWS] = weight.row_ptr[(first + r) / BLOCK_ROWS];
    }

    void add(const Weight& weight, const Shape& shape, const Cut& cut, int64_t, int64_t to,
             const float* staged) {
        for (int64_t r = 0; r < height; r += BLOCK_ROWS) {
            const int64_t first = next[r / BLOCK_ROWS];
            const int64_t end = weight.row_ptr[(top + r) / BLOCK_ROWS + 1];
            int64_t last = first;
            while (last < end && int64_t(weight.columns[last]) * BLOCK_COLS < to) ++last;
            next[r / BLOCK_ROWS] = last;
            for (int64_t b = 0; b < cut.batches; ++b)
                meet_with(weight, first, last, staged + staged_at(shape, b, 0, cut.lanes()),
                          sums + (b * cut.height + r) * cut.lanes(), cut.vectors);
        }
    }

    template <int VECTORS>
    static void meet_all(const Weight& weight, int64_t first, int64_t last, const float* x,
                         float* to) {
        for (int row = 0; row < BLOCK_ROWS; row += HEIGHT)
            meet_blocks<VECTORS>(weight, first, last, row, x, to + row * VECTORS * FLOATS);
    }

    static void meet_with(const Weight& weight, int64_t first, int64_t last, const float* x,
                          float* to, int64_t vectors) {
        switch (vectors) {
            case 4: return meet_all<4>(weight, first, last, x, to);
            case 3: return meet_all<3>(weight, first, last, x, to);
            case 2: return meet_all<2>(weight, first, last, x, to);
            default: return meet_all<1>(weight, first, last, x, to);
        }
    }
};

static Cut cut_of(const Shape& shape, int64_t left, int32_t threads) {
    const int64_t vectors = std::min<int64_t>((left + FLOATS - 1) / FLOATS, 4);
    return cut_off(shape, left, vectors, 4, SECOND_CACHE, TILE_UNIT, BAND_UNIT, threads);
}
