// x as tiles take it: words, each two columns of bfloat16 or four of int8, turned so that those of
// 16 rows of x lie beside each other, or of as many rows as there are.
struct TiledX {
    int64_t first = 0, rows = 0, lanes = 0, blocks = 0;  // of x; rows beside each other; of columns
    uint32_t* words = nullptr;  // [tiles][blocks][16][lanes]
    int8_t* codes = nullptr;    // [rows][in, padded]: x rounded
    float* scales = nullptr;

    TiledX() = default;
    TiledX(const TiledX&) = delete;
    ~TiledX() { std::free(words), std::free(codes), std::free(scales); }

    int64_t tiles() const { return (rows + TILE_ROWS - 1) / TILE_ROWS; }
    const uint32_t* tile(int64_t n, int64_t block) const {
        return words + (n * blocks + block) * TILE_ROWS * lanes;
    }
    static int64_t bytes_of_row(const Shape& shape) { return shape.padded() / WIDTH * TILE_LINE; }

    bool take_room(const Shape& shape, int64_t most) {
        const int64_t whole = (most + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
        const int64_t turned = most < TILE_ROWS ? most : whole;
        words = static_cast<uint32_t*>(std::aligned_alloc(64, bytes_of_row(shape) * turned));
        if (!DYNAMIC) return words;
        codes = static_cast<int8_t*>(std::aligned_alloc(64, bytes_of_row(shape) * most));
        scales = static_cast<float*>(std::malloc(most * sizeof(float)));
        return words && codes && scales;
    }

    void stage(const Value* x, const Shape& shape, int64_t from, int64_t count, int32_t workers) {
        first = from, rows = count, blocks = shape.padded() / WIDTH;
        lanes = std::min<int64_t>(TILE_ROWS, count);
        x += first * shape.in;
        if constexpr (DYNAMIC) parallel_for(rows, workers, [&](int64_t r) { round(x, shape, r); });
        parallel_for(tiles() * blocks, workers, [&](int64_t i) {
            turn(x, shape, i / blocks, i % blocks);
        });
    }

    void round(const Value* x, const Shape& shape, int64_t r) const {
        x += r * shape.in;
        scales[r] = scale_of(x, shape.in);
        for (int64_t c = 0; c < shape.in; c += WIDTH)
            stage_codes<0>(x + c, std::min<int64_t>(WIDTH, shape.in - c), scales[r],
                           codes + r * shape.padded() + c);
    }

    void turn(const Value* x, const Shape& shape, int64_t n, int64_t block) const {
        Vector square[FLOATS];
        for (int64_t i = 0; i < FLOATS; ++i) {
            const int64_t row = n * TILE_ROWS + i;
            square[i] = row < rows ? line(x, shape, row, block) : Vector{};
        }
        transpose(square);
        uint32_t* to = words + (n * blocks + block) * TILE_ROWS * lanes;
        const __mmask16 inside = (1u << lanes) - 1;
        for (int64_t i = 0; i < FLOATS; ++i)
            _mm512_mask_storeu_ps(to + i * lanes, inside, (__m512)square[i]);
    }

    // 64 bytes of a row, zero beyond its last column.
    Vector line(const Value* x, const Shape& shape, int64_t row, int64_t block) const {
        if constexpr (DYNAMIC) {
            return loaded<Vector>(codes + row * shape.padded() + block * WIDTH);
        } else {
            const int64_t columns = std::min<int64_t>(WIDTH, shape.in - block * WIDTH);
            const __mmask32 inside = _bzhi_u32(~0u, static_cast<uint32_t>(columns));
            const Value* from = x + row * shape.in + block * WIDTH;
            return (Vector)_mm512_maskz_loadu_epi16(inside, from);
        }
    }
};
