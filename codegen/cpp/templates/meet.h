// sums[lane] += values[i] * at(i)[lane] over a list of `count` weights, for VECTORS registers of
// lanes. A multiply-add takes some four cycles, so that few registers of sums are kept several times.
template <int VECTORS, class At>
static inline void meet(const float* values, int64_t count, const At& at, float* sums) {
    constexpr int CHAINS = std::max(1, 4 / VECTORS);
    Vector acc[CHAINS][VECTORS] = {};
    const auto add = [&](int chain, int64_t i) {
        const Vector weight = splat(values[i]);
        const float* x = at(i);
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v)
            acc[chain][v] += weight * loaded<Vector>(x + v * FLOATS);
    };
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) acc[0][v] = loaded<Vector>(sums + v * FLOATS);
    int64_t i = 0;
    for (; i + CHAINS <= count; i += CHAINS)
#pragma GCC unroll 4
        for (int chain = 0; chain < CHAINS; ++chain) add(chain, i + chain);
    for (; i < count; ++i) add(0, i);
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
#pragma GCC unroll 4
        for (int chain = 1; chain < CHAINS; ++chain) acc[0][v] += acc[chain][v];
        stored(acc[0][v], sums + v * FLOATS);
    }
}
