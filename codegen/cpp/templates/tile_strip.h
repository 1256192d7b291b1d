// 16 rows of W go through panels of columns: while one panel is multiplied the next is expanded,
// its weights and the zeros between them, so that what a tile loads was stored long before. Two
// panels and what is met with them stay in the first cache.
constexpr int PANEL = 8;    // blocks of columns
constexpr int AT_ONCE = 4;  // tiles of x that share a load of W
constexpr int ROWS_AT_ONCE = AT_ONCE * TILE_ROWS;
constexpr int SQUARE = TILE_ROWS * TILE_ROWS;  // sums of a tile

template <int COUNT, class Do>
static inline void each_tile(const Do& what) {
    what(std::integral_constant<int, 0>());
    if constexpr (COUNT > 1) what(std::integral_constant<int, 1>());
    if constexpr (COUNT > 2) what(std::integral_constant<int, 2>());
    if constexpr (COUNT > 3) what(std::integral_constant<int, 3>());
}

// What a worker multiplies with all of x at hand, and the memory that it writes to.
struct Strip {
    static constexpr int PANELS = 2 * PANEL * TILE;       // bytes
    static constexpr int OF_X = AT_ONCE, OF_WEIGHTS = 7;  // registers; sums are in the first
    const Weight& weight;
    const Shape& shape;
    const Tail& tail;
    const TiledX& x;
    uint8_t* desk;  // two panels, a tile a block, and sums: a SQUARE a tile of x
    int64_t top = 0, height = 0;
    Values values[TILE_ROWS] = {};  // where those of the next panel begin
    const uint8_t* keys[TILE_ROWS] = {};
    Ahead ahead = {};
    int64_t expanded = 0, steps = 0, done = 0;  // rows of the next panel; of the work on this one

    static int64_t room(const TiledX& x) {
        return PANELS + x.tiles() * SQUARE * int64_t(sizeof(TileSum));
    }
    uint8_t* panel_at(int64_t panel) const { return desk + panel % 2 * PANEL * TILE; }
    TileSum* sums_of(int64_t n) const {
        return reinterpret_cast<TileSum*>(desk + PANELS) + n * SQUARE;
    }

    void run(int64_t from) {
        top = from, height = std::min<int64_t>(TILE_ROWS, shape.out - from);
        ahead = weight.ahead(top, TILE_ROWS, shape);
        for (int r = 0; r < height; ++r) {
            const Row row = weight.row(top + r, shape);
            values[r] = row.values, keys[r] = row.keys;
        }
        for (int r = 0; r < height; ++r) expand_row(r, 0);
        for (int64_t first = 0; first < x.blocks; first += PANEL) multiply(first / PANEL);
        for (int64_t n = 0; n < x.tiles(); ++n) store(n);
    }

    void expand_row(int64_t r, int64_t panel) {
        const int64_t first = panel * PANEL;
        const int64_t whole = std::min<int64_t>(PANEL, shape.blocks() - first);
        const uint8_t* key = keys[r] + first * KEY_BYTES;
        uint8_t* to = panel_at(panel) + r * TILE_LINE;
        Values from = values[r];
        __builtin_prefetch(key + ahead.keys, 0, 2);
        if (whole == PANEL)
#pragma GCC unroll 8
            for (int b = 0; b < PANEL; ++b) expand_block(from, key + b * KEY_BYTES, to + b * TILE);
        else
            for (int b = 0; b < whole; ++b) expand_block(from, key + b * KEY_BYTES, to + b * TILE);
        if (whole < PANEL && shape.rest()) {
            LastValues copy;
            _mm512_store_si512(to + whole * TILE,
                               last_block(from, key + whole * KEY_BYTES, shape, copy));
        }
        values[r] = from;
    }

    void expand_block(Values& from, const uint8_t* at, uint8_t* to) const {
        Key key;
        std::memcpy(&key, at, KEY_BYTES);
        __builtin_prefetch(address(from + ahead.values), 0, 2);  // for the second cache
        _mm512_store_si512(to, expand(key, from));
        from += KEPT ? KEPT : __builtin_popcountll(key);
    }

    // The rows of the next panel that are due after a step of this one.
    void expand_due(int64_t panel) {
        for (++done; expanded < height && expanded * steps < done * height; ++expanded)
            expand_row(expanded, panel + 1);
    }

    void multiply(int64_t panel) {
        const int64_t blocks = std::min<int64_t>(PANEL, x.blocks - panel * PANEL);
        const bool is_last = panel * PANEL + blocks == x.blocks;
        expanded = is_last ? height : 0, done = 0;
        steps = (x.tiles() + AT_ONCE - 1) / AT_ONCE * blocks;
        int64_t n = 0;
        for (; n + 4 <= x.tiles(); n += 4) multiply_by<4>(panel, blocks, n);
        switch (x.tiles() - n) {
            case 3: return multiply_by<3>(panel, blocks, n);
            case 2: return multiply_by<2>(panel, blocks, n);
            case 1: return multiply_by<1>(panel, blocks, n);
        }
    }

    // COUNT tiles of x, of which n is the first.
    template <int COUNT>
    void multiply_by(int64_t panel, int64_t blocks, int64_t n) {
        each_tile<COUNT>([&](auto t) {
            if (panel == 0) tile_zero<t()>();
            else tile_load<t()>(sums_of(n + t()), TILE_LINE);
        });
        const int64_t line = x.lanes * int64_t(sizeof(TileSum));
        for (int64_t b = 0; b < blocks; ++b) {
            tile_load<OF_WEIGHTS>(panel_at(panel) + b * TILE, TILE_LINE);
            each_tile<COUNT>([&](auto t) {
                constexpr int OF = OF_X + t() % (OF_WEIGHTS - OF_X);
                tile_load<OF>(x.tile(n + t(), panel * PANEL + b), line);
                tile_multiply<t(), OF_WEIGHTS, OF>();
            });
            expand_due(panel);
        }
        each_tile<COUNT>([&](auto t) { tile_store<t()>(sums_of(n + t()), TILE_LINE); });
    }

    // 16 rows of W by 16 rows of x, as far as they exist.
    void store(int64_t n) const {
        Vector square[FLOATS];
        for (int r = 0; r < FLOATS; ++r) {
            square[r] = as_floats(sums_of(n) + r * TILE_ROWS);
            if (SCALED && r < height) square[r] *= widen(weight.scales + top + r);
        }
        transpose(square);
        for (int64_t i = 0; i < std::min<int64_t>(TILE_ROWS, x.rows - n * TILE_ROWS); ++i) {
            const int64_t row = n * TILE_ROWS + i;
            float line[TILE_ROWS];
            stored(DYNAMIC ? square[i] * x.scales[row] : square[i], line);
            if (height == TILE_ROWS) tail.store(line, top, x.first + row);
            else tail.store(line, height, top, x.first + row);
        }
    }

    static Vector as_floats(const float* p) { return loaded<Vector>(p); }
    static Vector as_floats(const int32_t* p) {
        return __builtin_convertvector(loaded<Ints>(p), Vector);
    }
};
