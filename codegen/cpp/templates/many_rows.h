// Many rows of x: y^T = W x^T. The lanes of a register are rows of x, so that a stored weight is one
// broadcast and one multiply-add for FLOATS rows, and a weight that is not stored costs nothing.
//
// x is transposed, `lanes` rows of it beside each other. A worker takes a band of rows of W through
// tiles of columns that a cache holds; its sums lie in memory between tiles. How a band meets a tile
// is the layout's: struct Desk, what a worker writes to, and cut_of(), how many rows of x it takes.

// The product with `cut.rows` rows of x, of which `first` is the first.
struct ManyRows {
    const Weight& weight;
    const Shape& shape;
    const Tail& tail;
    const Cut& cut;
    const Value* x;
    int64_t first;
    float* staged;  // [batches][in, or half of it for PAIRS][lanes]

    // Columns [from, from + FLOATS) of batch b.
    void stage(int64_t b, int64_t from) const {
        Vector square[FLOATS];
        for (int64_t lane = 0; lane < cut.lanes(); lane += FLOATS) {
            const int64_t row = b * cut.lanes() + lane, columns = shape.in - from;
            turned(x + (first + row) * shape.in + from, shape.in, cut.rows - row, columns, square);
            stage_square(square, std::min<int64_t>(FLOATS, columns), cut.lanes(),
                         staged + staged_at(shape, b, from, cut.lanes()) + lane);
        }
    }

    void band(int64_t top, Desk& desk) const {
        const int64_t height = std::min(cut.height, shape.out - top);
        std::memset(desk.sums, 0, cut.sums() * sizeof(float));
        desk.begin(weight, top, height);
        for (int64_t c = 0; c < shape.in; c += cut.tile)
            desk.add(weight, shape, cut, c, std::min(c + cut.tile, shape.in), staged);
        for (int64_t row = 0; row < cut.rows; row += FLOATS)
            for (int64_t r = 0; r < height; r += FLOATS) store(top, r, row, desk);
    }

    // FLOATS rows of x by FLOATS rows of W, as far as they exist.
    void store(int64_t top, int64_t r, int64_t row, const Desk& desk) const {
        Vector square[FLOATS];
        const int64_t lanes = cut.lanes(), column = top + r;
        const float* sums = desk.sums + (row / lanes * cut.height + r) * lanes + row % lanes;
#pragma GCC unroll 16
        for (int i = 0; i < FLOATS; ++i) square[i] = loaded<Vector>(sums + i * lanes);
        transpose(square);
        for (int64_t i = 0; i < std::min<int64_t>(FLOATS, cut.rows - row); ++i) {
            float line[FLOATS];
            stored(square[i], line);
            if (column + FLOATS <= shape.out) tail.store(line, column, first + row + i);
            else tail.store(line, shape.out - column, column, first + row + i);
        }
    }
};

static float* floats(int64_t count) {
    return static_cast<float*>(std::aligned_alloc(64, (count / 16 + 1) * 64));
}

static bool run_many(const Weight& weight, const Value* x, const Shape& shape, const Tail& tail,
                     const Cut& cut, int64_t first) {
    const int64_t size = cut.sums() + Desk::room_of(cut);
    float* staged = floats(staged_at(shape, cut.batches, 0, cut.lanes()));
    float* desks = floats(cut.workers * size);
    if (staged && desks) {
        const ManyRows many{weight, shape, tail, cut, x, first, staged};
        const int64_t blocks = (shape.in + FLOATS - 1) / FLOATS;
        parallel_for(cut.batches * blocks, cut.workers, [&](int64_t i) {
            many.stage(i / blocks, i % blocks * FLOATS);
        });
        std::atomic<int64_t> next{0};
        parallel_for(cut.workers, cut.workers, [&](int64_t worker) {
            Desk desk;
            desk.sums = desks + worker * size;
            desk.take_room(cut, desk.sums + cut.sums());
            for (int64_t top; (top = next.fetch_add(cut.height)) < shape.out;) many.band(top, desk);
        });
    }
    std::free(desks);
    std::free(staged);
    return staged && desks;
}

static bool many_rows(const Weight& weight, const Value* x, const Shape& shape, const Tail& tail,
                      int64_t batch, int32_t threads) {
    bool done = true;
    for (int64_t first = 0; first < batch && done;) {
        const Cut cut = cut_of(shape, batch - first, threads);
        done = run_many(weight, x, shape, tail, cut, first);
        first += cut.rows;
    }
    return done;
}
