// One query. Invisible elements are marked by -inf until the last sweep.
static void weigh_head(Decode& call, int64_t b, int64_t h) {
    const Problem& p = call.p;
    const int64_t n = p.key_tiles() * BLOCK_K;
    float* s = call.score_row(b, h);
    const float top = maximum(s, n), base = top == NEVER ? 0 : top;
    Ints seen{}, kept{};
    Vec all{}, sum{};
    for (int64_t c = 0; c < n; c += WIDTH) {
        seen -= load(s + c) != NEVER;
        if (p.is_post || p.denominator == EXACT) all += exponential(load(s + c) - base);
    }
    const int64_t count = add_lanes(seen);
    const float total = add_lanes(all);
    const Rule rule(p, h, top, total, count);
    for (int64_t c = 0; c < n; c += WIDTH) {
        const Vec x = load(s + c), weight = exponential(x - base);
        const Ints stay = stays(x, p.is_post ? weight * rule.unit : x, splat(rule.limit));
        store(s + c, stay ? weight : x == NEVER ? x : Vec{});
        sum += stay ? weight : Vec{};
        kept -= stay;
    }
    const int64_t left = add_lanes(kept);
    const float mass = add_lanes(sum);
    const float share = 1 / denominator(p, h, rule, total, mass, count, count - left);
    const float rest = p.v_mean ? (1 - mass * share) / float(std::max<int64_t>(count, 1)) : 0;
    for (int64_t c = 0; c < n; c += WIDTH) {
        const Vec weight = load(s + c);
        store(s + c, weight == NEVER ? Vec{} : weight * share + rest);
    }
    call.shares.at[b * p.heads + h] = 1;
    if (p.count) p.count[b * p.heads + h] = int32_t(left);
}

static void weigh(Decode& call, int64_t b, int64_t h) {
    const Problem& p = call.p;
    const int64_t head = b * p.kv_heads + h / p.group();
    for (int64_t g = 0; g < p.group(); ++g) weigh_head(call, b, h + g);
    int32_t *list = call.list.data() + head * p.keys, listed = 0;
    for (int64_t c = 0; c < p.keys; ++c) {
        bool any = false;
        for (int64_t g = 0; g < p.group(); ++g) any |= call.score_row(b, h + g)[c] != 0;
        if (any) list[listed++] = int32_t(c);
    }
    call.listed[head] = listed;
}
