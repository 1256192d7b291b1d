// Bits and indices: the weights that a band of rows of W keeps in a tile are listed once, and met
// with `lanes` rows of x after `lanes` rows.
constexpr int64_t MOST_TILE = 4096;  // columns of a tile

#include "meet.h"

// What a worker writes to.
struct Desk {
    float* sums;  // [batches][height][lanes]
    Kept room;    // all lists
    int64_t top, height;
    Kept lists[BAND];
    int64_t counts[BAND], seen[BAND];  // entries of a list; values left of the tile

    static int64_t list_room(const Cut& cut) { return cut.height * cut.tile + KEPT_SLACK; }
    // In floats.
    static int64_t room_of(const Cut& cut) { return list_room(cut) * 3 / 2 + 16; }
    void take_room(const Cut& cut, float* from) {
        room = {from, reinterpret_cast<uint16_t*>(from + list_room(cut))};
    }

    void begin(const Weight&, int64_t first, int64_t rows) {
        top = first;
        height = rows;
        std::memset(seen, 0, sizeof seen);
    }

    void add(const Weight& weight, const Shape& shape, const Cut& cut, int64_t from, int64_t to,
             const float* staged) {
        list(weight, shape, from, to);
        for (int64_t b = 0; b < cut.batches; ++b)
            meet_with(staged + staged_at(shape, b, from, cut.lanes()),
                      sums + b * cut.height * cut.lanes(), cut.vectors);
    }

    void list(const Weight& weight, const Shape& shape, int64_t from, int64_t to) {
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
    void meet_all(const float* x, float* to) const {
        for (int64_t r = 0; r < height; ++r) {
            const auto at = [&](int64_t i) {
                return x + int64_t(lists[r].columns[i]) * (VECTORS * FLOATS);
            };
            meet<VECTORS>(lists[r].values, counts[r], at, to + r * VECTORS * FLOATS);
        }
    }

    void meet_with(const float* x, float* to, int64_t vectors) const {
        switch (vectors) {
            case 8: return meet_all<8>(x, to);
            case 4: return meet_all<4>(x, to);
            case 3: return meet_all<3>(x, to);
            case 2: return meet_all<2>(x, to);
            default: return meet_all<1>(x, to);
        }
    }
};

// How to take the next of `left` rows of x. A well filled row of W is worth tiles for the first
// cache; of another so little falls into one that starting on it would cost more than it saves.
static Cut cut_of(const Shape& shape, int64_t left, int32_t threads) {
    const bool filled = shape.value_count * 10 > shape.in * shape.out * 3;
    const int64_t needed = (left + FLOATS - 1) / FLOATS;
    const int64_t vectors = needed >= 8 && !filled ? 8 : std::min<int64_t>(needed, 4);
    const int64_t most = MOST_TILE * vectors * FLOATS * int64_t(sizeof(float));
    const int64_t bytes = filled && vectors > 1 ? FIRST_CACHE : std::min(SECOND_CACHE, most);
    return cut_off(shape, left, vectors, filled ? 4 : 1, bytes, 64, FLOATS, threads);
}

// Whether there are so many rows of x that transposing them pays. Measured on Zen 4, of 4096 x 4096:
// float32 pays from 6, 12 and 30 rows on if a tenth, a fifth and a half is kept; where few_rows()
// multiplies two numbers of 16 bits at once, twice that.
static bool many_rows_pay(const Shape& shape, int64_t batch) {
    if (DYNAMIC) return false;  // x is not rounded here
    const int64_t rows = sizeof(X) == 2 ? 120 : 60;
    return batch * shape.in * shape.out >= rows * shape.value_count;
}
