// One tile of scores, transposed: rows of queries lie in the lanes, so that the maximum, the
// exponential and the sum of a row need no work across lanes, and K and V are read where they lie.
constexpr int64_t ROWS = BLOCK_Q;

// out[i][rows] = init * out[i][rows] + sum over n of column[n][rows] * x[i * step + n * stride] for
// COUNT values of i and LANES registers of rows; init is null for 0, or a factor of each row.
template <int COUNT, int LANES>
static inline void multiply(const float* column, int64_t terms, const float* x, int64_t step,
                            int64_t stride, const float* init, float* out) {
    Vec acc[COUNT][LANES];
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < LANES; ++j)
            acc[i][j] = init ? load(out + i * ROWS + j * WIDTH) * load(init + j * WIDTH) : Vec{};
    for (int64_t n = 0; n < terms; ++n, column += ROWS, x += stride) {
        Vec lanes[LANES];
#pragma GCC unroll 8
        for (int j = 0; j < LANES; ++j) lanes[j] = load(column + j * WIDTH);
#pragma GCC unroll 8
        for (int i = 0; i < COUNT; ++i)
#pragma GCC unroll 8
            for (int j = 0; j < LANES; ++j) acc[i][j] += x[i * step] * lanes[j];
    }
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < LANES; ++j) store(out + i * ROWS + j * WIDTH, acc[i][j]);
}

template <int LANES>
static inline void multiply_panel(const float* column, int64_t terms, const float* x, int64_t step,
                                  int64_t stride, const float* init, float* out, int64_t count) {
    int64_t i = 0;
    for (; i + 4 <= count; i += 4)
        multiply<4, LANES>(column, terms, x + i * step, step, stride, init, out + i * ROWS);
    for (; i < count; ++i)
        multiply<1, LANES>(column, terms, x + i * step, step, stride, init, out + i * ROWS);
}

// `multiply` for `count` values of i and `lanes` registers of rows.
static inline void multiply_all(const float* column, int64_t terms, const float* x, int64_t step,
                                int64_t stride, const float* init, float* out, int64_t count,
                                int64_t lanes) {
    for (int64_t j = 0; j < lanes;) {
        const int64_t r = j * WIDTH;
        const float* factor = init ? init + r : nullptr;
        if (lanes - j >= PANEL_LANES) {
            multiply_panel<PANEL_LANES>(column + r, terms, x, step, stride, factor, out + r, count);
            j += PANEL_LANES;
        } else {
            multiply_panel<1>(column + r, terms, x, step, stride, factor, out + r, count);
            ++j;
        }
    }
}

// Where the work of a thread lies.
struct Work {
    float *q, *s, *o;  // queries [DIM][ROWS], scores [BLOCK_K][ROWS], sums over V [DIM][ROWS]
    float *k, *v;      // copies of a tile, [BLOCK_K][DIM]
    float *top, *total, *tile_top, *alpha;  // [ROWS]
    float* extra;                           // [EXTRA_ROWS][ROWS]

    static constexpr int64_t SIZE =
        (2 * DIM + BLOCK_K + 4 + EXTRA_ROWS) * ROWS + 2 * BLOCK_K * DIM;
    explicit Work(float* at)
        : q(at), s(q + DIM * ROWS), o(s + BLOCK_K * ROWS), k(o + DIM * ROWS),
          v(k + BLOCK_K * DIM), top(v + BLOCK_K * DIM), total(top + ROWS),
          tile_top(total + ROWS), alpha(tile_top + ROWS), extra(alpha + ROWS) {}
};

// Rows [first, first + rows) of head h of batch b; unused lanes of q are 0.
struct RowTile {
    int64_t b, h, index, first, rows;
    int64_t lanes() const { return (rows + WIDTH - 1) / WIDTH; }  // registers
};

// The queries times scale, transposed, and sums over no keys.
static void begin(const Problem& p, const RowTile& tile, Work& work) {
    std::memset(work.q, 0, DIM * ROWS * sizeof(float));
    for (int64_t r = 0; r < tile.rows; ++r) {
        const Value* row = p.q_row(tile.b, tile.h, tile.first + r);
        for (int64_t d = 0; d < DIM; ++d) work.q[d * ROWS + r] = widen(row + d) * p.scale;
    }
    std::memset(work.o, 0, DIM * ROWS * sizeof(float));
    std::fill(work.top, work.top + ROWS, NEVER);
    std::fill(work.total, work.total + ROWS, 0.f);
}

// Rows of K or V as the products read them: in place if they are floats, else as a copy. With a
// stride of a multiple of 4 KiB all rows would share the same few places of the first cache.
struct Rows {
    const float* at;
    int64_t stride;
};

static inline Rows readable(const float* rows, int64_t stride, int64_t count, float* copy) {
    if (stride % 1024) return {rows, stride};
    for (int64_t c = 0; c < count; ++c) widen_row(rows + c * stride, copy + c * DIM, DIM);
    return {copy, DIM};
}

template <class T>
static inline Rows readable(const T* rows, int64_t stride, int64_t count, float* copy) {
    for (int64_t c = 0; c < count; ++c) widen_row(rows + c * stride, copy + c * DIM, DIM);
    return {copy, DIM};
}

// The scores of keys [c0, c0 + keys), before any mask.
static void score(const Problem& p, const RowTile& tile, int64_t c0, int64_t keys, Work& work) {
    const Rows k = readable(p.k_row(tile.b, tile.h, c0), p.k_stride[2], keys, work.k);
    multiply_all(work.q, DIM, k.at, k.stride, 1, nullptr, work.s, keys, tile.lanes());
}

// Whether every row sees every key, as far as their places tell.
static bool all_visible(const Problem& p, const RowTile& tile, int64_t c0, int64_t keys) {
    return c0 >= p.first_key(tile.first + tile.rows - 1) && c0 + keys <= p.end_key(tile.first);
}

static void hide_by_place(const Problem& p, const RowTile& tile, int64_t c0, int64_t keys,
                          float* s) {
    for (int64_t r = 0; r < tile.rows; ++r) {
        const int64_t from = p.first_key(tile.first + r), to = p.end_key(tile.first + r);
        for (int64_t c = 0; c < keys; ++c)
            if (c0 + c < from || c0 + c >= to) s[c * ROWS + r] = NEVER;
    }
}

enum class View { NOTHING, SOME, ALL };

// How much of the tile a mask of bools shows; one of floats is not looked through.
static View shown(const Problem& p, const RowTile& tile, int64_t c0, int64_t keys) {
    if (!MASKED) return View::ALL;
    if (!std::is_same_v<MaskValue, uint8_t>) return View::SOME;
    const int64_t step = p.mask_stride[3], next = p.mask_stride[2], rows = next ? tile.rows : 1;
    const MaskValue* mask = p.mask_at(tile.b, tile.h, tile.first, c0);
    bool any = false, all = true;
    for (int64_t r = 0; r < rows && (all || !any); ++r, mask += next)
        for (int64_t c = 0; c < keys; ++c) {
            any |= mask[c * step] != 0;
            all &= mask[c * step] != 0;
        }
    return all ? View::ALL : any ? View::SOME : View::NOTHING;
}

// WIDTH rows by WIDTH keys of a mask whose keys are contiguous; past the last row it is read again.
static inline void hide_block(const MaskValue* mask, int64_t next, int64_t rows, float* s) {
    Vec lanes[WIDTH];
    for (int64_t r = 0; r < WIDTH; ++r) lanes[r] = widen_lanes(mask + std::min(r, rows - 1) * next);
    transpose(lanes);
    for (int64_t c = 0; c < WIDTH; ++c)
        store(s + c * ROWS, masked(load(s + c * ROWS), lanes[c], mask));
}

static void hide_by_mask(const Problem& p, const RowTile& tile, int64_t c0, int64_t keys,
                         float* s) {
    const int64_t step = p.mask_stride[3], next = p.mask_stride[2];
    const MaskValue* mask = p.mask_at(tile.b, tile.h, tile.first, c0);
    const int64_t blocks = step == 1 ? keys / WIDTH * WIDTH : 0;
    for (int64_t r = 0; r < tile.rows; r += WIDTH)
        for (int64_t c = 0; c < blocks; c += WIDTH)
            hide_block(mask + r * next + c, next, tile.rows - r, s + c * ROWS + r);
    for (int64_t c = blocks; c < keys; ++c)
        for (int64_t r = 0; r < tile.rows; ++r)
            s[c * ROWS + r] = masked(s[c * ROWS + r], mask + r * next + c * step);
}

// The scores of keys [c0, c0 + keys), -inf where a row does not see a key; false if none does.
static bool score_visible(const Problem& p, const RowTile& tile, int64_t c0, int64_t keys,
                          Work& work) {
    const View view = shown(p, tile, c0, keys);
    if (view == View::NOTHING) return false;
    score(p, tile, c0, keys, work);
    if (view == View::SOME) hide_by_mask(p, tile, c0, keys, work.s);
    // Last: where the place hides a key, a mask of NaN or +inf must not show.
    if (!all_visible(p, tile, c0, keys)) hide_by_place(p, tile, c0, keys, work.s);
    return true;
}

// The largest of each row over the tile; NaN where a score is NaN.
static void tile_maxima(const float* s, int64_t keys, int64_t lanes, float* top) {
    for (int64_t j = 0; j < lanes; ++j) {
        Vec best = splat(NEVER);
        Odd odd{};
        int64_t c = 0;
        for (; c + 2 <= keys; c += 2) {
            const Vec x = load(s + c * ROWS + j * WIDTH), y = load(s + (c + 1) * ROWS + j * WIDTH);
            note(odd, x, y);
            best = larger(best, larger(x, y));
        }
        if (c < keys) {
            const Vec x = load(s + c * ROWS + j * WIDTH);
            note(odd, x, x);
            best = larger(best, x);
        }
        store(top + j * WIDTH, spoil(best, odd));
    }
}

// Scores become e^(score - top); top, total and alpha (what older sums count) go on to this tile.
static void exponentials(int64_t keys, int64_t lanes, Work& work) {
    for (int64_t j = 0; j < lanes * WIDTH; j += WIDTH) {
        const Vec before = load(work.top + j);
        const Vec top = larger_or_nan(before, load(work.tile_top + j));
        const Vec base = finite(top), alpha = exponential(before - base);
        Vec sum = load(work.total + j) * alpha;
        for (int64_t c = 0; c < keys; ++c) {
            const Vec weight = exponential(load(work.s + c * ROWS + j) - base);
            store(work.s + c * ROWS + j, weight);
            sum += weight;
        }
        store(work.top + j, top);
        store(work.alpha + j, alpha);
        store(work.total + j, sum);
    }
}

// o = alpha * o + V^T weights.
static void add_values(const Problem& p, const RowTile& tile, int64_t c0, int64_t keys,
                       Work& work) {
    const Rows v = readable(p.v_row(tile.b, tile.h, c0), p.v_stride[2], keys, work.v);
    multiply_all(work.s, keys, v.at, 1, v.stride, work.alpha, work.o, DIM, tile.lanes());
}

// out = o / total; 0 for a row that saw nothing.
static void finish(const Problem& p, const RowTile& tile, const Work& work) {
    for (int64_t r = 0; r < tile.rows; ++r) {
        const float total = work.total[r], share = total == 0 ? 0 : 1 / total;
        Value* out = p.out_row(tile.b, tile.h, tile.first + r);
        for (int64_t d = 0; d < DIM; ++d) narrow(work.o[d * ROWS + r] * share, out + d);
    }
}

// The rows of one tile, after `begin`.
static void attend(const Problem& p, const RowTile& tile, Work& work);

static int32_t prefill(const Problem& p) {
    const int64_t row_tiles = p.row_tiles();
    int32_t failed = 0;
#pragma omp parallel num_threads(p.threads) reduction(| : failed)
    {
        const Floats memory(Work::SIZE);
        Work work(memory.at);
        if (memory.none()) failed = 1;
        // Longest first: of each head the last rows, which see most keys under a causal mask.
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < p.batch * p.heads * row_tiles; ++i) {
            if (memory.none()) continue;
            const int64_t index = row_tiles - 1 - i % row_tiles, head = i / row_tiles;
            const int64_t first = index * BLOCK_Q, rows = std::min(ROWS, p.queries - first);
            const RowTile tile{head / p.heads, head % p.heads, index, first, rows};
            begin(p, tile, work);
            attend(p, tile, work);
        }
    }
    return failed;
}
