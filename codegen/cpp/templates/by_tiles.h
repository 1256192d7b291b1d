// How to multiply by any number of rows of x: few as above, more by tiles. y^T = W x^T, in blocks
// of 16 rows of W by WIDTH columns that are expanded once for all rows of x at hand.
#include "tile_stage.h"
#include "tile_strip.h"

static TileShapes shapes_of(int64_t lanes) {
    TileShapes shapes;
    for (int t = 0; t < 8; ++t) {
        shapes.rows[t] = TILE_ROWS;
        shapes.line[t] = t == Strip::OF_WEIGHTS ? TILE_LINE : lanes * int64_t(sizeof(TileSum));
    }
    return shapes;
}

static bool multiply_tiles(const Weight& weight, const Shape& shape, const Tail& tail,
                           const TiledX& x, int32_t workers) {
    const int64_t size = Strip::room(x);
    uint8_t* desks = static_cast<uint8_t*>(std::aligned_alloc(64, workers * size));
    if (!desks) return false;
    const TileShapes shapes = shapes_of(x.lanes);
    std::atomic<int64_t> next{0};
    parallel_for(workers, workers, [&](int64_t worker) {
        begin_tiles(shapes);
        Strip strip{weight, shape, tail, x, desks + worker * size};
        for (int64_t top; (top = next.fetch_add(TILE_ROWS)) < shape.out;) strip.run(top);
        end_tiles();
    });
    std::free(desks);
    return true;
}

// Rows of x that are taken at a time: what the second cache holds of them beside the rest.
static int64_t most_rows(const Shape& shape) {
    constexpr int64_t SECOND_CACHE = 1 << 20, MOST = 256;
    const int64_t fitting = SECOND_CACHE / TiledX::bytes_of_row(shape) / ROWS_AT_ONCE;
    return std::min(MOST, std::max<int64_t>(1, fitting) * ROWS_AT_ONCE);
}

static bool by_tiles(const Weight& weight, const Value* x, const Shape& shape, const Tail& tail,
                      int64_t batch, int32_t threads) {
    const int64_t chunks = (batch + most_rows(shape) - 1) / most_rows(shape);
    const int64_t even = (batch + chunks - 1) / chunks;
    const int64_t chunk = (even + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
    TiledX tiled;
    bool done = tiled.take_room(shape, std::min(chunk, batch));
    for (int64_t first = 0; first < batch && done; first += chunk) {
        const int64_t rows = std::min(chunk, batch - first);
        const int32_t workers = rows * shape.in * shape.out > SMALL ? threads : 1;
        tiled.stage(x, shape, first, rows, workers);
        done = multiply_tiles(weight, shape, tail, tiled, workers);
    }
    return done;
}

// The fastest way to multiply by `batch` rows of x.
static decltype(&few_rows) way(const Shape& shape, int64_t batch) {
    return MAY_USE_TILES && shape.in && batch >= FEWEST_BY_TILES ? by_tiles : few_rows;
}
