// What a call is about. Sizes and strides count elements; the last axis of q, k, v is contiguous.
struct Problem {
    const Value *q, *k, *v;
    const MaskValue* mask;          // uint8 (0 = not seen) or float (added)
    const float* factor;            // skip: scale factor of each head, [heads]
    const uint8_t* keep;            // block: listed tiles, strides below, last axis contiguous
    const int64_t* lengths;         // theta: row lengths, [points], ascending
    const float *theta, *lost;      // theta: [heads, points]
    Value* out;                     // [batch, queries, heads, DIM], contiguous
    int32_t* count;                 // computed: tiles [batch, heads, row tiles], or null
    int64_t batch, heads, kv_heads, queries, keys;
    int64_t q_stride[3], k_stride[3], v_stride[3];  // batch, head, row
    int64_t mask_stride[4];                         // batch, head, query, key; 0 = broadcast
    int64_t keep_stride[3];                         // batch, head, row tile; 0 = broadcast
    int64_t window, points, topk;
    float scale;
    int32_t is_causal, is_post, denominator, v_mean, threads;

    int64_t group() const { return heads / kv_heads; }
    int64_t key_tiles() const { return (keys + BLOCK_K - 1) / BLOCK_K; }
    int64_t row_tiles() const { return queries == 1 ? 1 : (queries + BLOCK_Q - 1) / BLOCK_Q; }
    // The keys that query i may see are [first_key(i), end_key(i)), if any.
    int64_t position(int64_t i) const { return keys - queries + i; }
    int64_t first_key(int64_t i) const {
        return window ? std::max<int64_t>(0, position(i) - window + 1) : 0;
    }
    int64_t end_key(int64_t i) const {
        return is_causal ? std::max<int64_t>(0, position(i) + 1) : keys;
    }
    const Value* q_row(int64_t b, int64_t h, int64_t i) const {
        return q + b * q_stride[0] + h * q_stride[1] + i * q_stride[2];
    }
    const Value* k_row(int64_t b, int64_t h, int64_t c) const {
        return k + b * k_stride[0] + h / group() * k_stride[1] + c * k_stride[2];
    }
    const Value* v_row(int64_t b, int64_t h, int64_t c) const {
        return v + b * v_stride[0] + h / group() * v_stride[1] + c * v_stride[2];
    }
    const MaskValue* mask_at(int64_t b, int64_t h, int64_t i, int64_t c) const {
        return mask + b * mask_stride[0] + h * mask_stride[1] + i * mask_stride[2] +
               c * mask_stride[3];
    }
    const uint8_t* keep_row(int64_t b, int64_t h, int64_t row_tile) const {
        return keep + b * keep_stride[0] + h * keep_stride[1] + row_tile * keep_stride[2];
    }
    Value* out_row(int64_t b, int64_t h, int64_t i) const {
        return out + ((b * queries + i) * heads + h) * DIM;
    }
    // ln(factor / keys), at most 0; NaN, with which no tile is skipped, for less than 0 and NaN.
    float log_lambda(int64_t h) const {
        const float exact = std::log(factor[h] / float(keys));
        return exact > 0 ? 0 : exact;
    }
};

// A score as the mask leaves it.
static inline float masked(float score, const uint8_t* mask) { return *mask ? score : NEVER; }
static inline float masked(float score, const float* mask) { return score + *mask; }
static inline Vec masked(Vec score, Vec mask, const uint8_t*) {
    return mask != 0.f ? score : splat(NEVER);
}
static inline Vec masked(Vec score, Vec mask, const float*) { return score + mask; }

// Memory that a thread, or a call, works in; `none` if there is none.
struct Floats {
    float* at;
    explicit Floats(int64_t count)
        : at(static_cast<float*>(std::aligned_alloc(64, (count * 4 + 63) / 64 * 64 + 64))) {}
    Floats(const Floats&) = delete;
    ~Floats() { std::free(at); }
    bool none() const { return !at; }
};
