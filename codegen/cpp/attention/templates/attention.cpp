// Skip-softmax and block attention on CPU: flash attention that leaves tiles of keys out. A tile is
// left out if it is not listed (BLOCK), or if in all its rows the largest score lies below the
// running maximum by more than -ln(lambda) (else); it then costs no exponential and no product with
// V. Scores and sums are float32 for any Value.
//
// The default specialisation below lets this file compile as it is. A generated kernel is this file
// with another specialisation: types, constants and the instruction set's registers.
#include "prelude.h"

// begin specialisation
using Value = float;
using MaskValue = uint8_t;            // uint8_t (0 = not seen) or float (added)
constexpr bool MASKED = true;         // whether there is a mask
constexpr int DIM = 64;               // of q, k and v
constexpr int BLOCK_Q = 64, BLOCK_K = 64;
constexpr bool BLOCK = false;         // tiles are listed, not judged by their scores
constexpr bool FROM_DIAGONAL = true;  // tiles 0, last, last - 1, ..., 1; else 0, 1, 2, ...
#include "lanes_portable.h"
// end specialisation

#include "lanes.h"

#include "problem.h"

constexpr int EXTRA_ROWS = 0;
#include "tile.h"

#include "decode.h"

// The `step`th of the tiles [from, to) to be visited.
static inline int64_t visited(int64_t step, int64_t from, int64_t to) {
    if (!FROM_DIAGONAL) return from + step;
    return from ? to - 1 - step : step ? to - step : 0;
}

// Whether a row whose largest score in a tile is `own`, and `top` in those before, sees a key of
// the tile and, unless tiles are listed, needs it. Where a score is NaN, it does.
static inline bool is_wanted(float own, float top, float limit) {
    const float depth = own > top ? 0 : own - top;
    return own != NEVER && (BLOCK || !(depth < limit));
}

static bool is_wanted(const RowTile& tile, float limit, const Work& work) {
    bool wanted = false;
    for (int64_t r = 0; r < tile.rows; ++r)
        wanted |= is_wanted(work.tile_top[r], work.top[r], limit);
    return wanted;
}

static void attend(const Problem& p, const RowTile& tile, Work& work) {
    const int64_t end = p.end_key(tile.first + tile.rows - 1);
    const int64_t from = p.first_key(tile.first) / BLOCK_K, to = (end + BLOCK_K - 1) / BLOCK_K;
    const float limit = BLOCK ? 0 : p.log_lambda(tile.h);
    int32_t computed = 0;
    for (int64_t step = 0; step < to - from; ++step) {
        const int64_t index = visited(step, from, to), c0 = index * BLOCK_K;
        if (BLOCK && !p.keep_row(tile.b, tile.h, tile.index)[index]) continue;
        const int64_t keys = std::min<int64_t>(BLOCK_K, end - c0);
        if (!score_visible(p, tile, c0, keys, work)) continue;
        tile_maxima(work.s, keys, tile.lanes(), work.tile_top);
        if (!is_wanted(tile, limit, work)) continue;
        exponentials(keys, tile.lanes(), work);
        add_values(p, tile, c0, keys, work);
        ++computed;
    }
    finish(p, tile, work);
    if (p.count) p.count[(tile.b * p.heads + tile.h) * p.row_tiles() + tile.index] = computed;
}

// Which tiles head h wants, by the running maximum of its one row; kept [key tiles].
static void judge(const Decode& call, int64_t b, int64_t h, uint8_t* kept) {
    const Problem& p = call.p;
    const int64_t tiles = p.key_tiles(), from = p.first_key(0) / BLOCK_K;
    const float limit = BLOCK ? 0 : p.log_lambda(h);
    float top = NEVER;
    for (int64_t step = 0; step < tiles - from; ++step) {
        const int64_t tile = visited(step, from, tiles);
        if (BLOCK && !p.keep_row(b, h, 0)[tile]) continue;
        const float own = maximum(call.score_row(b, h) + tile * BLOCK_K, BLOCK_K);
        kept[tile] = is_wanted(own, top, limit);
        top = larger_or_nan(top, own);
    }
}

// A tile that one head of the group wants is computed for all, unless tiles are listed; the keys of
// tiles that any head computes are listed.
static void share_tiles(Decode& call, int64_t b, int64_t h, uint8_t* kept) {
    const Problem& p = call.p;
    const int64_t group = p.group(), tiles = p.key_tiles(), head = b * p.kv_heads + h / group;
    int32_t *list = call.list.data() + head * p.keys, listed = 0;
    for (int64_t t = 0; t < tiles; ++t) {
        uint8_t any = 0;
        for (int64_t g = 0; g < group; ++g) any |= kept[g * tiles + t];
        if (!any) continue;
        for (int64_t g = 0; g < group && !BLOCK; ++g) kept[g * tiles + t] = 1;
        const int64_t from = std::max<int64_t>(t * BLOCK_K, p.first_key(0));
        const int64_t to = std::min<int64_t>((t + 1) * BLOCK_K, p.keys);
        for (int64_t c = from; c < to; ++c) list[listed++] = int32_t(c);
    }
    call.listed[head] = listed;
}

static void weigh_head(Decode& call, int64_t b, int64_t h, const uint8_t* kept) {
    const Problem& p = call.p;
    float *s = call.score_row(b, h), top = NEVER, total = 0;
    int32_t count = 0;
    for (int64_t t = 0; t < p.key_tiles(); ++t)
        if (kept[t]) top = larger_or_nan(top, maximum(s + t * BLOCK_K, BLOCK_K)), ++count;
    for (int64_t t = 0; t < p.key_tiles(); ++t)
        if (kept[t]) total += exponentials(s + t * BLOCK_K, BLOCK_K, top);
        else std::fill_n(s + t * BLOCK_K, BLOCK_K, 0.f);
    call.shares.at[b * p.heads + h] = total == 0 ? 0 : 1 / total;
    if (p.count) p.count[b * p.heads + h] = count;
}

static void weigh(Decode& call, int64_t b, int64_t h) {
    const Problem& p = call.p;
    const int64_t tiles = p.key_tiles();
    uint8_t* kept = call.kept.data() + (b * p.heads + h) * tiles;
    for (int64_t g = 0; g < p.group(); ++g) judge(call, b, h + g, kept + g * tiles);
    share_tiles(call, b, h, kept);
    for (int64_t g = 0; g < p.group(); ++g) weigh_head(call, b, h + g, kept + g * tiles);
}

#include "entry.h"
