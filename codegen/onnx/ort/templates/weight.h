// A weight of the file -> the keys that a kernel reads; done once, when the session is made.

struct Weight {
    int64_t out = 0, in = 0, row_bytes = 0, value_count = 0;
    std::vector<uint8_t> keys;     // [out, row_bytes]
    std::vector<int32_t> row_ptr;  // [out + 1] for a bitmap
};

constexpr int64_t ROOM = 64;  // bytes behind the keys: kernels read whole blocks

static void set_bit(Weight& weight, int64_t row, int64_t column) {
    weight.keys[row * weight.row_bytes + column / 8] |= 1 << column % 8;
}

// value i lies at flat place gaps[0] + ... + gaps[i]. Returns what is wrong, or null.
static const char* from_gaps(const uint8_t* gaps, int64_t count, Weight& weight) {
    if (weight.out <= 0 || weight.in <= 0 || weight.in > INT32_MAX / weight.out)
        return "its attribute shape is not that of a weight";
    weight.row_bytes = (weight.in + 7) / 8;
    weight.value_count = count;
    weight.keys.assign(weight.out * weight.row_bytes + ROOM, 0);
    weight.row_ptr.assign(weight.out + 1, 0);
    int64_t place = 0;
    for (int64_t i = 0; i < count; ++i) {
        place += gaps[i];
        if (place >= weight.out * weight.in) return "its gaps lead beyond the weight";
        if (i && !gaps[i]) return "a gap of 0: two of its values have one place";
        set_bit(weight, place / weight.in, place % weight.in);
        ++weight.row_ptr[place / weight.in + 1];
    }
    for (int64_t row = 0; row < weight.out; ++row) weight.row_ptr[row + 1] += weight.row_ptr[row];
    return nullptr;
}

// codes [out, bytes]: the column of each value in its group of m, 2 bits of it for m = 4, else 4.
// Kernels without indices get one keep bit a column. Returns what is wrong, or null.
static const char* from_codes(const uint8_t* codes, int64_t bytes, const sparsefx::Kernel& kernel,
                              Weight& weight) {
    const int bits = kernel.m == 4 ? 2 : 4, each = 8 / bits;
    const int64_t count = weight.in / kernel.m * kernel.n;
    if (weight.in % kernel.m || bytes != (count + each - 1) / each)
        return "its codes do not fit its values";
    weight.row_bytes = kernel.index_bits ? bytes : (weight.in + 7) / 8;
    weight.value_count = weight.out * count;
    weight.keys.assign(weight.out * weight.row_bytes + ROOM, 0);
    for (int64_t row = 0; row < weight.out; ++row) {
        const uint8_t* line = codes + row * bytes;
        for (int64_t i = 0, before = 0; i < count; ++i) {
            const int64_t code = line[i / each] >> i % each * bits & ((1 << bits) - 1);
            if (code >= kernel.m || (i % kernel.n && code <= before))
                return "the columns of a group do not ascend within it";
            before = code;
            if (!kernel.index_bits) set_bit(weight, row, i / kernel.n * kernel.m + code);
        }
        if (kernel.index_bits) std::memcpy(&weight.keys[row * bytes], line, bytes);
    }
    return nullptr;
}
