// Many rows of x: y^T = W x^T. The lanes of a register are rows of x, so that a stored weight is one
// broadcast and one multiply-add for FLOATS rows, and a weight that is not stored costs nothing.
//
// x is transposed, LANES rows of it beside each other. A thread takes a band of rows of W through
// tiles of columns that a cache holds: it lists the weights that the band keeps in the tile, then
// meets them with LANES rows of x after LANES rows. Its sums lie in memory between tiles.
#include "vectors.h"
#include "kept.h"

constexpr int64_t BAND = 256;                // rows of W that a worker takes at a time, at most
constexpr int64_t MOST_LANES = 16 * FLOATS;  // rows of x at a time
constexpr int64_t FIRST_CACHE = 32 << 10, SECOND_CACHE = 256 << 10;  // bytes of x in a tile
constexpr int64_t MOST_TILE = 4096;          // columns of a tile

// sums[lane] += weights . x[lane] for one list. A multiply-add takes some four cycles, so that few
// registers of sums are kept several times over.
template <int VECTORS>
static inline void meet(const Kept& kept, int64_t count, const float* x, float* sums) {
    constexpr int CHAINS = std::max(1, 4 / VECTORS);
    Vector acc[CHAINS][VECTORS] = {};
    const auto add = [&](int chain, int64_t i) {
        const Vector weight = splat(kept.values[i]);
        const float* column = x + int64_t(kept.columns[i]) * (VECTORS * FLOATS);
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v)
            acc[chain][v] += weight * loaded<Vector>(column + v * FLOATS);
    };
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) acc[0][v] = loaded<Vector>(sums + v * FLOATS);
    int64_t i = 0;
    for (; i + CHAINS <= count; i += CHAINS)
#pragma GCC unroll 4
        for (int chain = 0; chain < CHAINS; ++chain) add(chain, i + chain);
    for (; i < count; ++i) add(0, i);
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
#pragma GCC unroll 4
        for (int chain = 1; chain < CHAINS; ++chain) acc[0][v] += acc[chain][v];
        stored(acc[0][v], sums + v * FLOATS);
    }
}

// How many rows of x are taken at a time, and in which pieces.
struct Cut {
    int64_t rows;           // of x
    int64_t vectors;        // of rows of x that a list meets at a time
    int64_t batches;        // of so many rows that share the lists
    int64_t tile, height;   // columns of x; rows of W
    int32_t workers;
    int64_t lanes() const { return vectors * FLOATS; }
};

// What a worker writes to.
struct Desk {
    float* sums;  // [batches][height][lanes]
    Kept room;    // all lists
    Kept lists[BAND];
    int64_t counts[BAND], seen[BAND];  // entries of a list; values left of the tile

    void list(const Weight& weight, const Shape& shape, int64_t top, int64_t height, int64_t from,
              int64_t to) {
        Kept next = room;
        for (int64_t r = 0; r < height; ++r) {
            Row row = weight.row(top + r, shape);
            row.values += seen[r];
            lists[r] = next;
            counts[r] = list_kept(row, from, to, next);
            seen[r] += counts[r];
            next.values += counts[r];
            next.columns += counts[r];
        }
    }

    template <int VECTORS>
    void meet_all(const float* x, float* to, int64_t height) const {
        for (int64_t r = 0; r < height; ++r)
            meet<VECTORS>(lists[r], counts[r], x, to + r * VECTORS * FLOATS);
    }

    void meet_with(const float* x, float* to, int64_t height, int64_t vectors) const {
        switch (vectors) {
            case 8: return meet_all<8>(x, to, height);
            case 4: return meet_all<4>(x, to, height);
            case 3: return meet_all<3>(x, to, height);
            case 2: return meet_all<2>(x, to, height);
            default: return meet_all<1>(x, to, height);
        }
    }
};

// The product with `cut.rows` rows of x, of which `first` is the first.
struct ManyRows {
    const Weight& weight;
    const Shape& shape;
    const Tail& tail;
    const Cut& cut;
    const Value* x;
    int64_t first;
    float* staged;  // [batches][in][lanes]

    // Columns [from, from + FLOATS) of batch b.
    void stage(int64_t b, int64_t from) const {
        Vector square[FLOATS];
        for (int64_t lane = 0; lane < cut.lanes(); lane += FLOATS) {
            const int64_t row = b * cut.lanes() + lane, columns = shape.in - from;
            turned(x + (first + row) * shape.in + from, shape.in, cut.rows - row, columns, square);
            float* to = staged + (b * shape.in + from) * cut.lanes() + lane;
            for (int64_t c = 0; c < std::min<int64_t>(FLOATS, columns); ++c)
                stored(square[c], to + c * cut.lanes());
        }
    }

    void band(int64_t top, Desk& desk) const {
        const int64_t height = std::min(cut.height, shape.out - top);
        std::memset(desk.seen, 0, sizeof desk.seen);
        std::memset(desk.sums, 0, cut.batches * cut.height * cut.lanes() * sizeof(float));
        for (int64_t c = 0; c < shape.in; c += cut.tile) {
            desk.list(weight, shape, top, height, c, std::min(c + cut.tile, shape.in));
            for (int64_t b = 0; b < cut.batches; ++b)
                desk.meet_with(staged + (b * shape.in + c) * cut.lanes(),
                               desk.sums + b * cut.height * cut.lanes(), height, cut.vectors);
        }
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
    const int64_t sums = cut.batches * cut.height * cut.lanes();
    const int64_t room = cut.height * cut.tile + KEPT_SLACK;
    const int64_t desk_floats = sums + room + room / 2 + 16;
    float* staged = floats(cut.batches * shape.in * cut.lanes());
    float* desks = floats(cut.workers * desk_floats);
    if (staged && desks) {
        const ManyRows many{weight, shape, tail, cut, x, first, staged};
        const int64_t blocks = (shape.in + FLOATS - 1) / FLOATS;
        parallel_for(cut.batches * blocks, cut.workers, [&](int64_t i) {
            many.stage(i / blocks, i % blocks * FLOATS);
        });
        std::atomic<int64_t> next{0};
        parallel_for(cut.workers, cut.workers, [&](int64_t worker) {
            Desk desk;
            desk.sums = desks + worker * desk_floats;
            desk.room = {desk.sums + sums, reinterpret_cast<uint16_t*>(desk.sums + sums + room)};
            for (int64_t top; (top = next.fetch_add(cut.height)) < shape.out;) many.band(top, desk);
        });
    }
    std::free(desks);
    std::free(staged);
    return staged && desks;
}

// How to take the next of `left` rows of x. A well filled row of W is worth tiles for the first
// cache; of another so little falls into one that starting on it would cost more than it saves.
static Cut cut_of(const Shape& shape, int64_t left, int32_t threads) {
    const bool filled = shape.value_count * 10 > shape.in * shape.out * 3;
    const int64_t needed = (left + FLOATS - 1) / FLOATS;
    const int64_t vectors = needed >= 8 && !filled ? 8 : std::min<int64_t>(needed, 4);
    const int64_t lanes = vectors * FLOATS;
    const int64_t batches = filled ? std::max<int64_t>(1, std::min(left, MOST_LANES) / lanes) : 1;
    const int64_t rows = std::min(left, batches * lanes);
    const int64_t bytes = filled && vectors > 1 ? FIRST_CACHE : SECOND_CACHE;
    const int64_t tile = bytes / int64_t(sizeof(float)) / lanes / 64 * 64;
    const int32_t workers = rows * shape.in * shape.out > SMALL ? threads : 1;
    const int64_t bands = workers * ((shape.out + workers * BAND - 1) / (workers * BAND));
    const int64_t height = ((shape.out + bands - 1) / bands + FLOATS - 1) / FLOATS * FLOATS;
    return {rows, vectors, batches, std::max<int64_t>(64, std::min(tile, MOST_TILE)), height,
            workers};
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

// Whether there are so many rows of x that transposing them pays. Measured on Zen 4, of 4096 x 4096:
// float32 pays from 6, 12 and 30 rows on if a tenth, a fifth and a half is kept; where few_rows()
// multiplies two numbers of 16 bits at once, twice that.
static bool many_rows_pay(const Shape& shape, int64_t batch) {
    if (DYNAMIC) return false;  // x is not rounded here
    const int64_t rows = sizeof(X) == 2 ? 120 : 60;
    return batch * shape.in * shape.out >= rows * shape.value_count;
}
