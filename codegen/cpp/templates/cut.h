// How a product with many rows of x is cut into pieces that caches hold.
constexpr int64_t BAND = 256;                // rows of W that a worker takes at a time, at most
constexpr int64_t FIRST_CACHE = 32 << 10, SECOND_CACHE = 256 << 10;  // bytes of x in a tile

// How many rows of x are taken at a time, and in which pieces.
struct Cut {
    int64_t rows;           // of x
    int64_t vectors;        // of rows of x that a list meets at a time
    int64_t batches;        // of so many rows that share the lists
    int64_t tile, height;   // columns of x; rows of W
    int32_t workers;
    int64_t lanes() const { return vectors * FLOATS; }
    int64_t sums() const { return batches * height * lanes(); }  // of a band
};

// PAIRS: two neighbouring columns of x, of 16 bits, are staged in one register.
static inline int64_t staged_at(const Shape& shape, int64_t batch, int64_t column, int64_t lanes) {
    return (batch * shape.in + column) / (PAIRS ? 2 : 1) * lanes;
}

static inline void stage_square(const Vector (&square)[FLOATS], int64_t columns, int64_t lanes,
                                float* to) {
    if constexpr (PAIRS)
        for (int64_t c = 0; c < columns; c += 2)
            stored(paired(square[c], square[c + 1]), to + c / 2 * lanes);
    else
        for (int64_t c = 0; c < columns; ++c) stored(square[c], to + c * lanes);
}

// Cuts off the next of `left` rows of x, `batches` times `vectors` registers of them at most, for
// tiles of about `bytes`. Tiles are multiples of `columns`, bands of `rows` of W.
static Cut cut_off(const Shape& shape, int64_t left, int64_t vectors, int64_t batches,
                   int64_t bytes, int64_t columns, int64_t rows, int32_t threads) {
    const int64_t lanes = vectors * FLOATS;
    batches = std::max<int64_t>(1, std::min(left / lanes, batches));
    const int64_t taken = std::min(left, batches * lanes);
    const int64_t tile = bytes / (PAIRS ? 2 : 4) / lanes / columns * columns;
    const int32_t workers = taken * shape.in * shape.out > SMALL ? threads : 1;
    const int64_t bands = workers * ((shape.out + workers * BAND - 1) / (workers * BAND));
    const int64_t height = ((shape.out + bands - 1) / bands + rows - 1) / rows * rows;
    return {taken, vectors, batches, std::max(tile, columns), height, workers};
}
