// What becomes of sums: the epilogue, and their place in y.
struct Tail {
    const Value* bias;
    const Value* const* extras;
    Value* y;
    int64_t features;  // of a row of y
    // Stores the sums of `count` adjacent rows of W, from an even one on, with row `row` of x.
    void store(const float* sums, int64_t count, int64_t column, int64_t row) const {
        for (int64_t i = 0; i < count; i += OF_W) {
            const int64_t feature = (column + i) / OF_W, at = row * features + feature;
            narrow(epilogue(sums + i, feature, at, bias, extras), y + at);
        }
    }
    // The same for COUNT rows of W, in registers where the epilogue allows.
    template <int COUNT>
    void store(const float (&sums)[COUNT], int64_t column, int64_t row) const {
        const int64_t feature = column / OF_W, at = row * features + feature;
        float results[COUNT / OF_W];
        for (int i = 0; i < COUNT / OF_W; ++i)
            results[i] = epilogue(sums + i * OF_W, feature + i, at + i, bias, extras);
        for (int i = 0; i < COUNT / OF_W; ++i) narrow(results[i], y + at + i);
    }
};
