// More than one query: a first sweep over the visible tiles of keys finds each row's maximum, sum
// and number of visible keys, a second one weighs the values.

// What a row tile works in besides `Work`.
struct ThetaWork {
    float *means, *seen;  // sums of visible V [DIM][ROWS]; 1 where visible [BLOCK_K][ROWS]
    float *count, *base, *limit, *unit, *mass, *left;  // [ROWS]; left: elements kept
    explicit ThetaWork(float* at)
        : means(at), seen(means + DIM * ROWS), count(seen + BLOCK_K * ROWS), base(count + ROWS),
          limit(base + ROWS), unit(limit + ROWS), mass(unit + ROWS), left(mass + ROWS) {
        std::memset(at, 0, EXTRA_ROWS * ROWS * sizeof(float));
    }
};

static void find_sums(const Problem& p, const RowTile& tile, int64_t c0, int64_t keys, Work& work,
                      ThetaWork& own) {
    if (!score_visible(p, tile, c0, keys, work)) return;
    tile_maxima(work.s, keys, tile.lanes(), work.tile_top);
    for (int64_t j = 0; j < tile.lanes() * WIDTH; j += WIDTH) {
        Ints count{};
        for (int64_t c = 0; c < keys; ++c) count -= load(work.s + c * ROWS + j) != NEVER;
        store(own.count + j, load(own.count + j) + __builtin_convertvector(count, Vec));
    }
    exponentials(keys, tile.lanes(), work);
}

static void find_rules(const Problem& p, const RowTile& tile, const Work& work, ThetaWork& own) {
    for (int64_t r = 0; r < tile.rows; ++r) {
        const Rule rule(p, tile.h, work.top[r], work.total[r], int64_t(own.count[r]));
        own.base[r] = rule.base;
        own.limit[r] = rule.limit;
        own.unit[r] = rule.unit;
    }
}

// Scores become weights, 0 where dropped; returns whether any is left.
static bool drop(const Problem& p, int64_t keys, int64_t lanes, Work& work, ThetaWork& own) {
    Ints any{};
    for (int64_t j = 0; j < lanes * WIDTH; j += WIDTH) {
        const Vec base = load(own.base + j), limit = load(own.limit + j), unit = load(own.unit + j);
        Vec mass = load(own.mass + j);
        Ints left{};
        for (int64_t c = 0; c < keys; ++c) {
            const Vec x = load(work.s + c * ROWS + j), weight = exponential(x - base);
            const Ints stay = stays(x, p.is_post ? weight * unit : x, limit);
            const Vec kept = stay ? weight : Vec{};
            store(work.s + c * ROWS + j, kept);
            store(own.seen + c * ROWS + j, x != NEVER ? splat(1) : Vec{});
            mass += kept;
            left -= stay;
        }
        any |= left;
        store(own.mass + j, mass);
        store(own.left + j, load(own.left + j) + __builtin_convertvector(left, Vec));
    }
    return add_lanes(any) != 0;
}

static void add_means(const Problem& p, const RowTile& tile, int64_t c0, int64_t keys,
                      const float* one, ThetaWork& own, float* copy) {
    const Rows v = readable(p.v_row(tile.b, tile.h, c0), p.v_stride[2], keys, copy);
    if (MASKED || !all_visible(p, tile, c0, keys)) {
        multiply_all(own.seen, keys, v.at, 1, v.stride, one, own.means, DIM, tile.lanes());
        return;
    }
    float sums[DIM] = {};
    for (int64_t c = 0; c < keys; ++c)
        for (int64_t d = 0; d < DIM; ++d) sums[d] += v.at[c * v.stride + d];
    for (int64_t d = 0; d < DIM; ++d)
        for (int64_t r = 0; r < ROWS; ++r) own.means[d * ROWS + r] += sums[d];
}

static void finish_theta(const Problem& p, const RowTile& tile, const Work& work,
                         const ThetaWork& own) {
    for (int64_t r = 0; r < tile.rows; ++r) {
        const int64_t i = tile.first + r, count = int64_t(own.count[r]);
        const Rule rule(p, tile.h, work.top[r], work.total[r], count);
        const int64_t left = int64_t(own.left[r]);
        const float total = work.total[r], mass = own.mass[r];
        const float share = 1 / denominator(p, tile.h, rule, total, mass, count, count - left);
        const float rest = p.v_mean ? (1 - mass * share) / float(std::max<int64_t>(count, 1)) : 0;
        Value* out = p.out_row(tile.b, tile.h, i);
        for (int64_t d = 0; d < DIM; ++d)
            narrow(work.o[d * ROWS + r] * share + own.means[d * ROWS + r] * rest, out + d);
        if (p.count) p.count[(tile.b * p.heads + tile.h) * p.queries + i] = int32_t(left);
    }
}

static void attend(const Problem& p, const RowTile& tile, Work& work) {
    ThetaWork own(work.extra);
    const int64_t end = p.end_key(tile.first + tile.rows - 1), first = p.first_key(tile.first);
    const int64_t start = first / BLOCK_K * BLOCK_K;
    for (int64_t c = start; c < end; c += BLOCK_K)
        find_sums(p, tile, c, std::min<int64_t>(BLOCK_K, end - c), work, own);
    find_rules(p, tile, work, own);
    std::fill(work.alpha, work.alpha + ROWS, 1.f);
    for (int64_t c = start; c < end; c += BLOCK_K) {
        const int64_t keys = std::min<int64_t>(BLOCK_K, end - c);
        if (!score_visible(p, tile, c, keys, work)) continue;
        if (drop(p, keys, tile.lanes(), work, own)) add_values(p, tile, c, keys, work);
        if (p.v_mean) add_means(p, tile, c, keys, work.alpha, own, work.v);
    }
    finish_theta(p, tile, work, own);
}
