// Which weights a row of W keeps in a tile of columns, as a list: their values as floats, and their
// columns, counted from the first of the tile. A tile begins at a multiple of 64 columns.
struct Kept {
    float* values;
    uint16_t* columns;
};

constexpr int KEPT_SLACK = 32;  // entries that may be written behind the end of a list

static inline uint64_t key_of(const uint8_t* keys, int64_t bytes) {
    uint64_t key = 0;
    if (bytes >= 4) std::memcpy(&key, keys, 4);
    else
        for (int64_t i = 0; i < bytes; ++i) key |= uint64_t(keys[i]) << 8 * i;
    return key;
}

#ifdef __AVX512VBMI2__
struct WordColumns {
    uint16_t column[32];
    constexpr WordColumns() : column() {
        for (int c = 0; c < 32; ++c) column[c] = c;
    }
};
alignas(64) static constexpr WordColumns WORD_COLUMNS;

static inline int64_t columns_of_bits(const uint8_t* keys, int64_t columns, uint16_t* list) {
    uint16_t* next = list;
    __m512i places = _mm512_load_si512(&WORD_COLUMNS);
    for (int64_t c = 0; c < columns; c += 32, keys += 4) {
        const uint32_t keep = key_of(keys, (columns - c + 7) / 8);
        _mm512_storeu_si512(next, _mm512_maskz_compress_epi16(keep, places));
        places = _mm512_add_epi16(places, _mm512_set1_epi16(32));
        next += __builtin_popcount(keep);
    }
    return next - list;
}
#else
struct Places {  // of the bits of a byte, lowest first
    uint16_t column[256][8];
    constexpr Places() : column() {
        for (int keep = 0; keep < 256; ++keep)
            for (int bit = 0, count = 0; bit < 8; ++bit)
                if (keep >> bit & 1) column[keep][count++] = bit;
    }
};
static constexpr Places PLACES;

static inline int64_t columns_of_bits(const uint8_t* keys, int64_t columns, uint16_t* list) {
    typedef uint16_t Eight __attribute__((vector_size(16)));
    uint16_t* next = list;
    for (int64_t c = 0; c < columns; c += 8, ++keys) {
        const int keep = *keys;
        const Eight places = loaded<Eight>(PLACES.column[keep]) + uint16_t(c);
        std::memcpy(next, &places, sizeof places);
        next += __builtin_popcount(keep);
    }
    return next - list;
}
#endif

// Four bytes of indices, 16 or 8 of them, at a time.
static inline int64_t columns_of_indices(const uint8_t* keys, int64_t columns, uint16_t* list) {
    constexpr int STEP = 32 / std::max(1, INDEX_BITS), KEPT_OF = std::max(1, N);
    typedef uint32_t Codes __attribute__((vector_size(4 * STEP)));
    typedef uint16_t Columns __attribute__((vector_size(2 * STEP)));
    const int64_t count = columns / M * N;
    Codes shift, group;
    for (int i = 0; i < STEP; ++i) shift[i] = i * INDEX_BITS;
    for (int i = 0; i < STEP; ++i) group[i] = i / KEPT_OF * M;
    for (int64_t at = 0; at < count; at += STEP, keys += 4) {
        const uint32_t key = key_of(keys, ((count - at) * INDEX_BITS + 7) / 8);
        if constexpr (STEP % KEPT_OF) // groups straddle steps
            for (int i = 0; i < STEP; ++i) group[i] = (at + i) / KEPT_OF * M - at / KEPT_OF * M;
        const Codes codes = ((key - Codes{}) >> shift & ((1u << INDEX_BITS) - 1)) + group;
        const Columns found = __builtin_convertvector(codes + uint32_t(at / KEPT_OF * M), Columns);
        std::memcpy(list + at, &found, sizeof found);
    }
    return count;
}

// `count` values as floats. Reads and writes FLOATS - 1 too many.
static inline void widen_values(const Values& values, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i += FLOATS) stored(widened(values + i), to + i);
}

// Lists the columns [from, to) of a row of W, of which `row.values` are the first values; returns
// how many are kept. Reads FLOATS - 1 values too many.
static inline int64_t list_kept(const Row& row, int64_t from, int64_t to, const Kept& list) {
    const int64_t before = INDEX_BITS ? from / M * N * INDEX_BITS / 8 : from / 8;
    const int64_t count = INDEX_BITS
        ? columns_of_indices(row.keys + before, to - from, list.columns)
        : columns_of_bits(row.keys + before, to - from, list.columns);
    widen_values(row.values, count, list.values);
    if constexpr (SCALED)
        for (int64_t i = 0; i < count; ++i)
            list.values[i] *= widen(row.scales + (GROUP ? (from + list.columns[i]) / std::max(1, GROUP) : 0));
    return count;
}
