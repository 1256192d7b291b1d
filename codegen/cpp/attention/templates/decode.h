// One query: the heads of a KV head go together, so that K is read once and a row of V only if a
// head needs it. Dimensions lie in the lanes. First all scores, then the weights, which `weigh`
// makes of them, then the sum of the rows of V that have a weight. How keys are dealt out does not
// depend on the number of threads, so neither does any bit of the result.
constexpr int64_t PADDED = (DIM + WIDTH - 1) / WIDTH * WIDTH;
constexpr int64_t SHARE = 1024;      // keys that a thread takes at a time, a multiple of BLOCK_K
constexpr int64_t SIDE_BY_SIDE = 32; // rows of V added up before the sums go back to memory

struct Decode {
    const Problem& p;
    int64_t row, parts;  // floats of a row of scores; pieces that the sums over V are made of
    Floats queries;      // [batch, heads, PADDED]: q times scale, 0 behind DIM
    Floats scores;       // [batch, heads, row]: scores, then weights; -inf behind the last key
    Floats sums;         // [batch, kv_heads, parts, group, PADDED]
    Floats shares;       // [batch, heads]: what the sum is multiplied by
    std::vector<int32_t> list, listed;  // keys to add up [batch, kv_heads, keys], how many
    std::vector<uint8_t> kept;          // [batch, heads, key tiles]

    explicit Decode(const Problem& p)
        : p(p), row((p.keys / SHARE + 2) * SHARE), parts((p.keys + SHARE - 1) / SHARE),
          queries(p.batch * p.heads * PADDED), scores(p.batch * p.heads * row),
          sums(p.batch * p.heads * parts * PADDED), shares(p.batch * p.heads),
          list(p.batch * p.kv_heads * p.keys), listed(p.batch * p.kv_heads),
          kept(p.batch * p.heads * p.key_tiles()) {}
    bool none() const {
        return queries.none() || scores.none() || sums.none() || shares.none();
    }
    float* query(int64_t b, int64_t h) const { return queries.at + (b * p.heads + h) * PADDED; }
    float* score_row(int64_t b, int64_t h) const { return scores.at + (b * p.heads + h) * row; }
};

// Whether a head of the group asks for a tile at all.
static inline bool is_listed(const Problem& p, int64_t b, int64_t h, int64_t tile) {
    if constexpr (!BLOCK) return true;
    for (int64_t g = 0; g < p.group(); ++g)
        if (p.keep_row(b, h + g, 0)[tile]) return true;
    return false;
}

// A row as PADDED floats: in place if it is that already, else as a copy.
static inline const float* padded(const float* row, float* copy) {
    if (DIM == PADDED) return row;
    widen_row(row, copy, DIM);
    return copy;
}

template <class T>
static inline const float* padded(const T* row, float* copy) {
    widen_row(row, copy, DIM);
    return copy;
}

static inline Vec dot(const float* q, const float* const (&rows)[WIDTH]) {
    Vec sums[WIDTH] = {};
    for (int64_t d = 0; d < PADDED; d += WIDTH) {
        const Vec x = load(q + d);
#pragma GCC unroll 16
        for (int i = 0; i < WIDTH; ++i) sums[i] += x * load(rows[i] + d);
    }
    return totals(sums);
}

static void load_query(const Decode& call, int64_t b, int64_t h) {
    float* q = call.query(b, h);
    std::memset(q, 0, PADDED * sizeof(float));
    for (int64_t d = 0; d < DIM; ++d) q[d] = widen(call.p.q_row(b, h, 0) + d) * call.p.scale;
}

// The scores of keys [c0, c1) for the heads h, h + 1, ... of a KV head.
static void score_keys(const Decode& call, int64_t b, int64_t h, int64_t c0, int64_t c1) {
    const Problem& p = call.p;
    alignas(64) float copy[WIDTH * PADDED] = {};
    for (int64_t c = c0; c < c1; c += WIDTH) {
        const float* rows[WIDTH];  // behind the last key it is read again; `score_share` mends that
        for (int i = 0; i < WIDTH; ++i)
            rows[i] = padded(p.k_row(b, h, std::min(c + i, c1 - 1)), copy + i * PADDED);
        for (int64_t g = 0; g < p.group(); ++g)
            store(call.score_row(b, h + g) + c, dot(call.query(b, h + g), rows));
    }
    if constexpr (MASKED)
        for (int64_t g = 0; g < p.group(); ++g) {
            float* s = call.score_row(b, h + g);
            for (int64_t c = c0; c < c1; ++c) s[c] = masked(s[c], p.mask_at(b, h + g, 0, c));
        }
}

static void score_share(const Decode& call, int64_t b, int64_t h, int64_t share) {
    const Problem& p = call.p;
    const int64_t end = std::min((share + 1) * SHARE, p.keys), first = p.first_key(0);
    for (int64_t c = share * SHARE; c < end; c += BLOCK_K) {
        const int64_t from = std::max(c, first), to = std::min<int64_t>(c + BLOCK_K, end);
        // From c on: starting elsewhere, the last registers would reach into the next share.
        if (from < to && is_listed(p, b, h, c / BLOCK_K)) score_keys(call, b, h, c, to);
        for (int64_t g = 0; g < p.group(); ++g) {
            float* s = call.score_row(b, h + g);
            std::fill(s + c, s + std::min(std::max(c, from), to), NEVER);
            std::fill(s + to, s + c + BLOCK_K, NEVER);
        }
    }
}

// sums[g][d] += the rows of V times their weights, HEADS heads by COUNT registers.
template <int HEADS, int COUNT>
static inline void add_rows(const float* const* weights, const int32_t* keys, int64_t n,
                            const float* const* rows, int64_t d, float* sums) {
    Vec acc[HEADS][COUNT];
#pragma GCC unroll 4
    for (int g = 0; g < HEADS; ++g)
#pragma GCC unroll 4
        for (int j = 0; j < COUNT; ++j) acc[g][j] = load(sums + g * PADDED + d + j * WIDTH);
    for (int64_t i = 0; i < n; ++i) {
        Vec value[COUNT];
#pragma GCC unroll 4
        for (int j = 0; j < COUNT; ++j) value[j] = load(rows[i] + d + j * WIDTH);
#pragma GCC unroll 4
        for (int g = 0; g < HEADS; ++g)
#pragma GCC unroll 4
            for (int j = 0; j < COUNT; ++j) acc[g][j] += weights[g][keys[i]] * value[j];
    }
#pragma GCC unroll 4
    for (int g = 0; g < HEADS; ++g)
#pragma GCC unroll 4
        for (int j = 0; j < COUNT; ++j) store(sums + g * PADDED + d + j * WIDTH, acc[g][j]);
}

template <int HEADS>
static inline void add_rows_of_heads(const float* const* weights, const int32_t* keys, int64_t n,
                                     const float* const* rows, float* sums) {
    int64_t d = 0;
    for (; d + PANEL_LANES * WIDTH <= PADDED; d += PANEL_LANES * WIDTH)
        add_rows<HEADS, PANEL_LANES>(weights, keys, n, rows, d, sums);
    for (; d < PADDED; d += WIDTH) add_rows<HEADS, 1>(weights, keys, n, rows, d, sums);
}

// One piece of the sum over V for the heads of a KV head.
static void add_part(const Decode& call, int64_t b, int64_t h, int64_t part) {
    const Problem& p = call.p;
    const int64_t head = b * p.kv_heads + h / p.group(), group = p.group();
    const int32_t* keys = call.list.data() + head * p.keys + part * SHARE;
    const int64_t count = std::min(SHARE, call.listed[head] - part * SHARE);
    float* sums = call.sums.at + (head * call.parts + part) * group * PADDED;
    alignas(64) float copy[SIDE_BY_SIDE * PADDED] = {};
    std::memset(sums, 0, group * PADDED * sizeof(float));
    for (int64_t i = 0; i < count; i += SIDE_BY_SIDE, keys += SIDE_BY_SIDE) {
        const int64_t n = std::min(SIDE_BY_SIDE, count - i);
        const float* rows[SIDE_BY_SIDE];
        for (int64_t r = 0; r < n; ++r)
            rows[r] = padded(p.v_row(b, h, keys[r]), copy + r * PADDED);
        for (int64_t g = 0; g < group; g += 4) {
            const float* weights[4];
            for (int64_t j = 0; j < 4; ++j)
                weights[j] = call.score_row(b, h + std::min(g + j, group - 1));
            float* to = sums + g * PADDED;
            switch (std::min<int64_t>(4, group - g)) {
                case 4: add_rows_of_heads<4>(weights, keys, n, rows, to); break;
                case 3: add_rows_of_heads<3>(weights, keys, n, rows, to); break;
                case 2: add_rows_of_heads<2>(weights, keys, n, rows, to); break;
                default: add_rows_of_heads<1>(weights, keys, n, rows, to);
            }
        }
    }
}

// The pieces in order, as the result of head h.
static void add_up(const Decode& call, int64_t b, int64_t h) {
    const Problem& p = call.p;
    const int64_t head = b * p.kv_heads + h / p.group(), g = h % p.group();
    const int64_t parts = (call.listed[head] + SHARE - 1) / SHARE;
    float result[DIM] = {};
    for (int64_t part = 0; part < parts; ++part) {
        const float* sums =
            call.sums.at + ((head * call.parts + part) * p.group() + g) * PADDED;
        for (int64_t d = 0; d < DIM; ++d) result[d] += sums[d];
    }
    Value* out = p.out_row(b, h, 0);
    for (int64_t d = 0; d < DIM; ++d) narrow(result[d] * call.shares.at[b * p.heads + h], out + d);
}

// Makes weights of the scores of heads h, h + 1, ... of a KV head; lists the keys that have one.
static void weigh(Decode& call, int64_t b, int64_t h);

// All steps of a KV head in one thread, without waiting for others.
static void decode_head(Decode& call, int64_t b, int64_t h) {
    for (int64_t part = 0; part < call.parts; ++part) score_share(call, b, h, part);
    weigh(call, b, h);
    const int64_t listed = call.listed[b * call.p.kv_heads + h / call.p.group()];
    for (int64_t part = 0; part * SHARE < listed; ++part) add_part(call, b, h, part);
    for (int64_t g = 0; g < call.p.group(); ++g) add_up(call, b, h + g);
}

// Step by step, the keys of a head dealt out to all threads.
static void decode_shares(Decode& call) {
    const Problem& p = call.p;
    const int64_t heads = p.batch * p.kv_heads, group = p.group();
#pragma omp parallel num_threads(p.threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < heads * call.parts; ++i) {
            const int64_t head = i / call.parts;
            score_share(call, head / p.kv_heads, head % p.kv_heads * group, i % call.parts);
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < heads; ++i) weigh(call, i / p.kv_heads, i % p.kv_heads * group);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < heads * call.parts; ++i) {
            const int64_t head = i / call.parts, part = i % call.parts;
            if (part * SHARE < call.listed[head])
                add_part(call, head / p.kv_heads, head % p.kv_heads * group, part);
        }
#pragma omp for
        for (int64_t i = 0; i < p.batch * p.heads; ++i) add_up(call, i / p.heads, i % p.heads);
    }
}

static int32_t decode(const Problem& p) {
    Decode call(p);
    if (call.none()) return 1;
    for (int64_t i = 0; i < p.batch * p.heads; ++i) load_query(call, i / p.heads, i % p.heads);
    const int64_t heads = p.batch * p.kv_heads;
    if (heads % p.threads && heads < 4 * p.threads) {
        decode_shares(call);
        return 0;
    }
#pragma omp parallel for num_threads(p.threads) schedule(dynamic)
    for (int64_t i = 0; i < heads; ++i)
        decode_head(call, i / p.kv_heads, i % p.kv_heads * p.group());
    return 0;
}
