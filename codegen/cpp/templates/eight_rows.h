// 3 to 8 rows of x, few weights kept: y^T = W x^T as in many_rows.h, with 8 lanes. A stored weight
// is one broadcast and one multiply-add of 32 bytes of x^T, a tile of which stays in the first
// cache. What the next row of W keeps is listed while this one is multiplied. Columns that hold no
// value are not read: NaN or infinity there does not reach y.
constexpr int64_t EIGHT = 8;
constexpr int64_t EIGHT_TILE = 1024;        // columns of x^T in the first cache, at most
constexpr int64_t EIGHT_BYTES = 100 << 10;  // of W that a worker takes at a time, about: few pages
constexpr bool READY = std::is_same_v<Stored, float>;  // values need not be widened

struct WordPlaces {
    uint8_t column[64];
    constexpr WordPlaces() : column() {
        for (int c = 0; c < 64; ++c) column[c] = c;
    }
};
alignas(64) static constexpr WordPlaces WORD_PLACES;

// Columns count in units of 8 bytes of x^T, which an address can multiply by: PLACE units each.
constexpr int PLACE = EIGHT * sizeof(float) / 8;

static inline __m512i places_of(__m256i columns, __m512i first) {
    return _mm512_add_epi16(_mm512_slli_epi16(_mm512_cvtepu8_epi16(columns), 2), first);
}

// Lists what 64 columns keep, the first of which has the place `first`; returns the list's end.
static inline uint16_t* list_word(uint64_t keep, __m512i first, uint16_t* list) {
    const __m512i columns = _mm512_maskz_compress_epi8(keep, _mm512_load_si512(&WORD_PLACES));
    const int count = __builtin_popcountll(keep);
    _mm512_storeu_si512(list, places_of(_mm512_castsi512_si256(columns), first));
    if (count > 32)
        _mm512_storeu_si512(list + 32, places_of(_mm512_extracti64x4_epi64(columns, 1), first));
    return list + count;
}

// sums += values * columns of x^T, by lanes. What lies at `next` is fetched meanwhile.
static inline void meet_eight(const float* values, const uint16_t* places, int64_t count,
                              const float* xt, Values next, float* sums) {
    __m256 acc[EIGHT];
    acc[0] = _mm256_loadu_ps(sums);
#pragma GCC unroll 8
    for (int i = 1; i < EIGHT; ++i) acc[i] = _mm256_setzero_ps();
    const auto add = [&](const float* value, const uint16_t* place) {
#pragma GCC unroll 8
        for (int i = 0; i < EIGHT; ++i)
            acc[i] = _mm256_fmadd_ps(_mm256_broadcast_ss(value + i),
                                     _mm256_loadu_ps(xt + int64_t(place[i]) * 2), acc[i]);
    };
    int64_t i = 0;
    for (; i + EIGHT <= count; i += EIGHT, next += EIGHT) {
        __builtin_prefetch(address(next), 0, 2);
        add(values + i, places + i);
    }
    float last[EIGHT];
    _mm256_storeu_ps(last, _mm256_maskz_loadu_ps(_bzhi_u32(255, count - i), values + i));
    add(last, places + i);
#pragma GCC unroll 3
    for (int half = EIGHT / 2; half; half /= 2)
#pragma GCC unroll 4
        for (int a = 0; a < half; ++a) acc[a] += acc[a + half];
    _mm256_storeu_ps(sums, acc[0]);
}

// What a worker writes to.
struct EightDesk {
    float* sums;    // [height][EIGHT]
    Kept lists[2];  // of a row of W and the next one; places for columns, one room for values
    int32_t* seen;  // [height], values left of the tile

    static int64_t list_room(int64_t tile) { return tile + 2 * KEPT_SLACK; }
    // In floats.
    static int64_t room_of(int64_t height, int64_t tile) {
        return height * (EIGHT + 1) + 2 * list_room(tile);
    }
    EightDesk(int64_t height, int64_t tile, float* room) : sums(room) {
        float* values = sums + height * EIGHT;
        auto* places = reinterpret_cast<uint16_t*>(values + list_room(tile));
        lists[0] = {values, places};
        lists[1] = {values, places + list_room(tile)};
        seen = reinterpret_cast<int32_t*>(values + 2 * list_room(tile));
    }
};

struct EightRows {
    const Weight& weight;
    const Shape& shape;
    const Tail& tail;
    const Value* x;
    int64_t batch, tile, height;
    float* staged;  // [tiles][tile + 1][EIGHT], the last column of a tile 0

    int64_t tiles() const { return (shape.in + tile - 1) / tile; }
    float* tile_at(int64_t t) const { return staged + t * (tile + 1) * EIGHT; }

    // Columns [from, from + FLOATS).
    void stage(int64_t from) const {
        Vector square[FLOATS];
        turned(x + from, shape.in, batch, shape.in - from, square);
        float* to = tile_at(from / tile) + from % tile * EIGHT;
        for (int64_t c = 0; c < FLOATS; ++c)
            _mm256_storeu_ps(to + c * EIGHT, _mm512_castps512_ps256(square[c]));
        if (from % tile == 0) std::fill_n(tile_at(from / tile) + tile * EIGHT, EIGHT, 0.f);
    }

    // Lists what row r of W keeps in tile t, and a column of zeros behind it; returns how many.
    int64_t list(int64_t r, int64_t t, uint16_t* places) const {
        const uint8_t* keys = weight.keys + r * shape.row_bytes + t * tile / 8;
        const int64_t columns = std::min(tile, shape.in - t * tile);
        __m512i first = _mm512_setzero_si512();
        uint16_t* next = places;
        uint64_t keep = 0;
#pragma GCC unroll 4
        for (int64_t word = 0; word < columns / 64; ++word) {
            std::memcpy(&keep, keys + word * 8, 8);
            next = list_word(keep, first, next);
            first = _mm512_add_epi16(first, _mm512_set1_epi16(64 * PLACE));
        }
        if (columns % 64) {
            keep = 0;
            std::memcpy(&keep, keys + columns / 64 * 8, (columns % 64 + 7) / 8);
            next = list_word(keep, first, next);
        }
        std::fill_n(next, EIGHT, uint16_t(tile * PLACE));
        return next - places;
    }

    // Rows [top, top + rows) of W times tile t; `ahead` is where the next rows are.
    void add_tile(int64_t top, int64_t rows, int64_t t, Ahead ahead, const EightDesk& desk) const {
        int64_t listed = list(top, t, desk.lists[0].columns);
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t count = listed;
            Row row = weight.row(top + r, shape);
            __builtin_prefetch(row.keys + ahead.keys + t * tile / 8, 0, 2);
            __builtin_prefetch(row.keys + ahead.keys + t * tile / 8 + 64, 0, 2);
            if (r + 1 < rows) listed = list(top + r + 1, t, desk.lists[(r + 1) % 2].columns);
            const Kept& kept = desk.lists[r % 2];
            row.values += desk.seen[r];
            desk.seen[r] += count;
            if constexpr (!READY) widen_values(row.values, count, kept.values);
            const void* values = READY ? address(row.values) : kept.values;
            meet_eight(static_cast<const float*>(values), kept.columns, count, tile_at(t),
                       row.values + ahead.values, desk.sums + r * EIGHT);
        }
    }

    // The rows of W from `top` on; the worker takes those from `next` on afterwards.
    void band(int64_t top, int64_t next, const EightDesk& desk) const {
        const int64_t rows = std::min(height, shape.out - top);
        const Ahead ahead = next < shape.out ? weight.ahead(top, next - top, shape) : Ahead{0, 0};
        std::fill_n(desk.sums, rows * EIGHT, 0.f);
        std::fill_n(desk.seen, rows, 0);
        for (int64_t t = 0; t < tiles(); ++t) add_tile(top, rows, t, ahead, desk);
        for (int64_t r = 0; r < rows; r += FLOATS)
            store(desk.sums + r * EIGHT, top + r, std::min<int64_t>(FLOATS, rows - r));
    }

    // `count` rows of W from `column` on.
    void store(const float* sums, int64_t column, int64_t count) const {
        Vector square[FLOATS];
#pragma GCC unroll 16
        for (int i = 0; i < FLOATS; ++i)
            square[i] = _mm512_zextps256_ps512(_mm256_loadu_ps(sums + i * EIGHT));
        transpose(square);
        for (int64_t i = 0; i < batch; ++i) {
            float line[FLOATS];
            stored(square[i], line);
            if (count == FLOATS) tail.store(line, column, i);
            else tail.store(line, count, column, i);
        }
    }
};

static bool eight_rows(const Weight& weight, const Value* x, const Shape& shape, const Tail& tail,
                       int64_t batch, int32_t threads) {
    const int64_t pieces = (shape.in + EIGHT_TILE - 1) / EIGHT_TILE;
    const int64_t tile = (shape.in + pieces * 64 - 1) / (pieces * 64) * 64;
    const int32_t workers = batch * shape.in * shape.out > SMALL ? threads : 1;
    const int64_t row = bytes_of(shape.value_count) / shape.out + shape.row_bytes;
    const int64_t most = std::min(EIGHT_BYTES / row, shape.out / (2 * workers));
    const int64_t height = (std::min(most, BAND) / FLOATS + 1) * FLOATS;
    const int64_t blocks = (shape.in + FLOATS - 1) / FLOATS;
    const int64_t size = (EightDesk::room_of(height, tile) + 15) / 16 * 16;
    const int64_t staged_size = (pieces * (tile + 1) * EIGHT + 15) / 16 * 16;
    float* staged = floats(staged_size + workers * size);
    if (!staged) return false;
    const EightRows eight{weight, shape, tail, x, batch, tile, height, staged};
    parallel_for(blocks, workers, [&](int64_t i) { eight.stage(i * FLOATS); });
    std::atomic<int64_t> next{0};
    parallel_for(workers, workers, [&](int64_t worker) {
        const EightDesk desk(height, tile, staged + staged_size + worker * size);
        for (int64_t top = next.fetch_add(height); top < shape.out;) {
            const int64_t after = next.fetch_add(height);
            eight.band(top, after, desk);
            top = after;
        }
    });
    std::free(staged);
    return true;
}

// Measured on Emerald Rapids, one thread, 4096 x 4096, over the time of the other ways: 8 rows take
// 0.7 of it if a twentieth or a tenth is kept, 0.9 to 1 if a fifth is; 4 rows 0.7, 1, 1.2 to 1.5.
// Of bfloat16, 8 rows take 0.4 of it if a tenth is kept, 0.6 if a fifth is; of int8, up to 1.6.
static bool eight_rows_pay(const Shape& shape, int64_t batch) {
    if (SCALED || N || batch < 3 || batch > EIGHT) return false;  // no scales are multiplied here
    if (!shape.in) return false;
    return batch * shape.in * shape.out >= 36 * shape.value_count;
}
