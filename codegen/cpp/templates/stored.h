// Where weights lie and how many bytes they take: numbers, or codes that a scale multiplies.

// Codes of 4 bits, two a byte, the low half first.
struct Nibbles {
    const uint8_t* bytes;
    int64_t at;  // which half of which byte
    Nibbles operator+(int64_t count) const { return {bytes, at + count}; }
    Nibbles& operator+=(int64_t count) { return at += count, *this; }
};

constexpr bool IS_INT4 = std::is_same_v<Stored, int4>;
using Values = std::conditional_t<IS_INT4, Nibbles, const Stored*>;

template <class Of = Values>
static inline Of values_in(const void* bytes) {
    if constexpr (IS_INT4) return Of{static_cast<const uint8_t*>(bytes), 0};
    else return static_cast<Of>(bytes);
}

static inline const void* address(const Nibbles& p) { return p.bytes + (p.at >> 1); }
static inline const void* address(const void* p) { return p; }

// How many codes of the first byte lie before p.
static inline int64_t halves_before(const Nibbles& p) { return p.at & 1; }
static inline int64_t halves_before(const void*) { return 0; }

static inline int64_t bytes_of(int64_t count) {
    return IS_INT4 ? (count + 1) / 2 : count * int64_t(sizeof(Stored));
}

static inline float widen(const int8_t* p) { return *p; }

static inline float widen(const Nibbles& p) {
    return int8_t(p.bytes[p.at >> 1] >> 4 * (p.at & 1) << 4) >> 4;
}

static inline uint64_t sixteen(const Nibbles& p) {
    uint64_t low, high;
    std::memcpy(&low, p.bytes + (p.at >> 1), 8);
    std::memcpy(&high, p.bytes + (p.at >> 1) + 1, 8);
    const uint64_t is_odd = p.at & 1;
    return low >> 4 * is_odd | (high << 4 & -is_odd);
}
