// y = epilogue(x W^T) on CPU, with W [out, in] stored as its kept values in row order and keys that
// say which columns they are of: one bit a column (1 = kept, lowest bit = lowest column), or for
// INDEX_BITS > 0 the column of each value inside its group of M. Sums are float32 for any Value.
//
// The default specialisation below lets this file compile as it is. A generated kernel is this file
// with another specialisation: types, constants, the instruction set's block and the epilogue.
#include "prelude.h"
#include "activations.h"

// begin specialisation
using Value = float;    // of x, y, bias and scales
using Stored = Value;   // of the weights: Value, int8_t or int4
extern "C" const char sparsefx_dtype[16] = "float32", sparsefx_stored[16] = "float32";
constexpr int SCALED = 0, GROUP = 0;  // whether weights have scales; columns of one, 0: all
constexpr int DYNAMIC = 0;            // whether x is rounded to int8, each row with its scale
constexpr int N = 2, M = 4;  // N kept of each M columns; 0, 1: as many as the bits say
constexpr int BIAS = 0, EXTRAS = 0;
constexpr int OF_W = 1;  // rows of W that make a feature of y: 2 where one gates the other
#include "openmp.h"
#include "stored.h"
#include "portable.h"

static inline float epilogue(const float* sums, int64_t, int64_t, const Value*,
                             const Value* const*) {
    return sums[0];
}
// end specialisation

constexpr int KEPT = WIDTH * N / M;  // values of a block of WIDTH columns; 0: as its bits say
constexpr int ROWS = 12;             // rows of W that a thread takes at a time
constexpr int64_t CHUNK = 64;        // rows of x staged at a time
constexpr int64_t ROOM = 64;         // bytes that expand() may read from where values begin

// Where a row of W begins.
struct Row {
    Values values;
    const uint8_t* keys;
    const Value* scales;
};

// How far from a row of W lies the one that the thread walks next: what is fetched into the cache
// meanwhile. Rows are too short for the processor to foresee much of it.
struct Ahead {
    int64_t values, keys;
};

struct Shape {
    int64_t in, out, row_bytes, value_count;
    int64_t blocks() const { return in / WIDTH; }
    int64_t rest() const { return in % WIDTH; }
    int64_t padded() const { return (in + WIDTH - 1) / WIDTH * WIDTH; }
    int64_t groups() const { return GROUP ? (in + GROUP - 1) / std::max(1, GROUP) : 1; }
};

// Rows of x as dot() reads them, and the scale of each where x is rounded.
struct Staged {
    const X* rows;
    const float* scales;
};

// The block whose keys are given; `values` moves on behind its values.
static inline Lanes next_block(Values& values, const uint8_t* keys, int64_t ahead) {
    Key key = 0;
    std::memcpy(&key, keys, KEY_BYTES);
    __builtin_prefetch(address(values + ahead));
    const Lanes lanes = expand(key, values);
    values += KEPT ? KEPT : __builtin_popcountll(key);
    return lanes;
}

// Room for the values of the last columns, which the Lanes that are made of them may point to.
struct LastValues {
    uint8_t bytes[WIDTH * sizeof(Stored) + ROOM] = {};
};

// The last columns, fewer than WIDTH; the values that follow belong to another row.
static Lanes last_block(const Values& values, const uint8_t* keys, const Shape& shape,
                        LastValues& copy) {
    Key key = 0;
    std::memcpy(&key, keys, shape.row_bytes - shape.blocks() * KEY_BYTES);
    const int64_t count = KEPT ? shape.rest() / M * N : __builtin_popcountll(key);
    const int64_t before = halves_before(values);
    std::memcpy(copy.bytes, address(values), bytes_of(before + count));
    return expand(key, values_in(copy.bytes) + before);
}

// All loops over r and b below are unrolled, or sums would live in memory.
template <int HEIGHT, int BATCH>
struct Sums {
    Sum of[HEIGHT][BATCH] = {};
    Sum zeros[HEIGHT] = {};  // what staged zeros add, where ZERO is not 0
};

template <int HEIGHT, int BATCH>
static inline void add_block(Sums<HEIGHT, BATCH>& sums, const Lanes (&weights)[HEIGHT],
                             const X* x) {
#pragma GCC unroll 8
    for (int b = 0; b < BATCH; ++b) {
        const Input columns = input(x + b * WIDTH);
#pragma GCC unroll 4
        for (int r = 0; r < HEIGHT; ++r) multiply_add(sums.of[r][b], weights[r], columns);
    }
    if constexpr (ZERO != 0)
#pragma GCC unroll 4
        for (int r = 0; r < HEIGHT; ++r) add_zeros(sums.zeros[r], weights[r]);
}

// parts[r][b] += the sums, times the scale that the rows of W have for a group of columns.
template <int HEIGHT, int BATCH>
static inline void add_group(Part (&parts)[HEIGHT][BATCH], const Sums<HEIGHT, BATCH>& sums,
                             const Row (&rows)[HEIGHT], int64_t group) {
#pragma GCC unroll 4
    for (int r = 0; r < HEIGHT; ++r)
#pragma GCC unroll 8
        for (int b = 0; b < BATCH; ++b) {
            Sum sum = sums.of[r][b];
            if constexpr (ZERO != 0) sum = without(sum, sums.zeros[r]);
            if constexpr (SCALED) add_scaled(parts[r][b], sum, widen(rows[r].scales + group));
            else parts[r][b] = sum;
        }
}

// dots[r][b] = W[r] . x[b] for HEIGHT rows of W and BATCH rows of x; a block of W is used for all
// BATCH rows. x is staged: block 0 of the BATCH rows, block 1 of them, ...
template <int HEIGHT, int BATCH>
static inline void dot(const Row (&rows)[HEIGHT], const X* x, const Shape& shape, Ahead ahead,
                       float (&dots)[HEIGHT][BATCH]) {
    Part parts[HEIGHT][BATCH] = {};
    Lanes weights[HEIGHT];
    Values values[HEIGHT];  // in registers, as a Row that moves on would not be
    for (int r = 0; r < HEIGHT; ++r) values[r] = rows[r].values;
    int64_t block = 0;
    for (int64_t group = 0; group < shape.groups(); ++group) {
        Sums<HEIGHT, BATCH> sums;
        const int64_t end = GROUP ? std::min(block + GROUP / WIDTH, shape.blocks()) : shape.blocks();
        for (; block < end; ++block, x += BATCH * WIDTH) {
            const int64_t at = block * KEY_BYTES;
            __builtin_prefetch(rows[0].keys + ahead.keys + at * HEIGHT);
#pragma GCC unroll 4
            for (int r = 0; r < HEIGHT; ++r)
                weights[r] = next_block(values[r], rows[r].keys + at, ahead.values);
            add_block(sums, weights, x);
        }
        if (shape.rest() && group == shape.groups() - 1) {
            LastValues copies[HEIGHT];
#pragma GCC unroll 4
            for (int r = 0; r < HEIGHT; ++r)
                weights[r] =
                    last_block(values[r], rows[r].keys + block * KEY_BYTES, shape, copies[r]);
            add_block(sums, weights, x);
        }
        add_group(parts, sums, rows, group);
    }
#pragma GCC unroll 4
    for (int r = 0; r < HEIGHT; ++r)
#pragma GCC unroll 8
        for (int b = 0; b < BATCH; ++b) dots[r][b] = total(parts[r][b]);
}

struct Weight {
    Values values;
    const uint8_t* keys;
    const int32_t* row_ptr;
    const Value* scales;
    // The rows from `padded_row` on end too near the end of `values` for expand(), so a copy of
    // them, with room behind it, is read instead.
    int64_t padded_row;
    Values padded;

    int64_t start(int64_t r, const Shape& shape) const {
        const int64_t of_row = shape.in / M * N;
        return !N ? row_ptr[r] : r * (IS_INT4 ? of_row + of_row % 2 : of_row);
    }
    Row row(int64_t r, const Shape& shape) const {
        const int64_t at = start(r, shape);
        return {r < padded_row ? values + at : padded + (at - start(padded_row, shape)),
                keys + r * shape.row_bytes, SCALED ? scales + r * shape.groups() : nullptr};
    }
    Ahead ahead(int64_t r, int64_t height, const Shape& shape) const {
        const int64_t next = std::min(r + height, shape.out);
        return {start(next, shape) - start(r, shape), height * shape.row_bytes};
    }
    void* pad(const Shape& shape) {
        const int64_t bytes = bytes_of(shape.value_count);
        padded_row = shape.out;
        do --padded_row;
        while (padded_row > 0 && bytes_of(start(padded_row, shape)) + ROOM > bytes);
        const int64_t from = start(padded_row, shape), count = bytes - bytes_of(from);
        void* copy = std::calloc(count + ROOM, 1);
        if (copy && count) std::memcpy(copy, address(values + from), count);
        padded = values_in(copy);
        return copy;
    }
};

#include "tail.h"

// sums[b][r] of HEIGHT rows of W by BATCH rows of x. Past the last row of W its last one is read
// again and the result is dropped, which saves a second copy of this code for the remainder.
template <int HEIGHT, int BATCH>
static inline void rows_by_batch(const Weight& weight, const Staged& x, const Shape& shape,
                                 int64_t column, float (*sums)[ROWS]) {
    Row rows[HEIGHT];
    for (int r = 0; r < HEIGHT; ++r)
        rows[r] = weight.row(std::min(column + r, shape.out - 1), shape);
    float dots[HEIGHT][BATCH];
    dot(rows, x.rows, shape, weight.ahead(column, HEIGHT, shape), dots);
    for (int b = 0; b < BATCH; ++b)
        for (int r = 0; r < HEIGHT; ++r) sums[b][r] = DYNAMIC ? dots[r][b] * x.scales[b] : dots[r][b];
}

// ROWS rows of W by BATCH rows of x, of which the first `batch` are wanted; as many rows of W side
// by side as registers hold sums.
template <int BATCH>
static void group_by_batch(const Weight& weight, const Staged& x, const Shape& shape, const Tail& tail,
                           int64_t column, int64_t first, int64_t batch) {
    constexpr int HEIGHT = std::max(1, std::min(4, SUMS / BATCH));
    const int64_t count = std::min<int64_t>(ROWS, shape.out - column);
    float sums[BATCH][ROWS];
    for (int64_t r = 0; r < count; r += HEIGHT)
        rows_by_batch<HEIGHT, BATCH>(weight, x, shape, column + r,
                                     reinterpret_cast<float (*)[ROWS]>(&sums[0][r]));
    for (int b = 0; b < std::min<int64_t>(BATCH, batch); ++b)
        tail.store(sums[b], count, column, first + b);
}

// How many rows of x are multiplied at a time when `left` are left. Rows of zeros fill up a block:
// to expand weights once more would cost more.
static int batch_block(int64_t left) {
    int block = 1;
    while (block < std::min<int64_t>(left, MAX_BATCH)) block *= 2;
    return block;
}

static int64_t filled_up(int64_t batch) {
    const int64_t rest = batch % MAX_BATCH;
    return batch - rest + (rest ? batch_block(rest) : 0);
}

static void group(const Weight& weight, const Staged& x, const Shape& shape, const Tail& tail,
                  int64_t column, int64_t first, int64_t batch) {
    for (int64_t done = 0; done < batch;) {
        const int block = batch_block(batch - done);
        const Staged rows{x.rows + done * shape.padded(), x.scales + done};
        const int64_t at = first + done, left = batch - done;
        switch (block) {
            case 8: group_by_batch<8>(weight, rows, shape, tail, column, at, left); break;
            case 4: group_by_batch<4>(weight, rows, shape, tail, column, at, left); break;
            case 2: group_by_batch<2>(weight, rows, shape, tail, column, at, left); break;
            default: group_by_batch<1>(weight, rows, shape, tail, column, at, left);
        }
        done += block;
    }
}

// Whether x lies as dot() reads it already.
static bool is_staged(const Shape& shape, int64_t batch) {
    return std::is_same_v<X, Value> && !DYNAMIC && batch == 1 && shape.rest() == 0;
}

// The largest of a row of x is 127 of these; NaN if not all of it is finite, so that y is NaN too.
static float scale_of(const Value* x, int64_t columns) {
    int32_t largest = 0;  // sizes of numbers compare as their bits do
    for (int64_t c = 0; c < columns; ++c) {
        const float wide = widen(x + c);
        int32_t bits;
        std::memcpy(&bits, &wide, sizeof bits);
        largest = std::max(largest, bits & 0x7FFFFFFF);
    }
    float size;
    std::memcpy(&size, &largest, sizeof size);
    return std::isfinite(size) ? size / 127 : NAN;
}

template <int OFFSET = ZERO, class Code>
static void stage_codes(const Value* x, int64_t columns, float scale, Code* staged) {
    constexpr float SHIFT = 0x1.8p23f;  // added and taken off again, rounds half to even
    const float divisor = scale != 0 ? scale : 1;
    for (int64_t c = 0; c < columns; ++c) {
        const float code = std::max(-127.f, std::min(127.f, widen(x + c) / divisor));
        staged[c] = Code(static_cast<int32_t>(code + SHIFT - SHIFT) + OFFSET);
    }
    for (int64_t c = columns; c < WIDTH; ++c) staged[c] = Code(OFFSET);
}

// Copies `batch` rows of x into the order and type that dot() reads, filled up with zeros.
template <class To>
static void stage(const Value* x, To* staged, float* scales, const Shape& shape, int64_t batch) {
    for (int64_t done = 0; done < batch;) {
        const int block = batch_block(batch - done);
        for (int b = 0; b < block; ++b, x += shape.in) {
            const int64_t in = done + b < batch ? shape.in : 0;
            if (DYNAMIC) scales[done + b] = scale_of(x, in);
            for (int64_t c = 0; c < shape.padded(); c += WIDTH) {
                const int64_t columns = std::max<int64_t>(0, std::min<int64_t>(WIDTH, in - c));
                To* at = staged + c * block + b * WIDTH;
                if constexpr (DYNAMIC) stage_codes(x + c, columns, scales[done + b], at);
                else stage_block(x + c, columns, at);
            }
        }
        staged += block * shape.padded();
        done += block;
    }
}

static bool few_rows(const Weight& weight, const Value* x, const Shape& shape, const Tail& tail,
                     int64_t batch, int32_t threads) {
    const size_t bytes = filled_up(std::min(batch, CHUNK)) * shape.padded() * sizeof(X);
    X* staged = static_cast<X*>(std::aligned_alloc(64, (bytes / 64 + 1) * 64));
    if (!staged) return false;
    const int64_t groups = (shape.out + ROWS - 1) / ROWS;
    for (int64_t first = 0; first < batch; first += CHUNK) {
        const int64_t rows = std::min(CHUNK, batch - first);
        const Value* from = x + first * shape.in;
        const bool as_it_is = is_staged(shape, rows);
        float scales[CHUNK];
        if (!as_it_is) stage(from, staged, scales, shape, rows);
        const Staged ready{as_it_is ? reinterpret_cast<const X*>(from) : staged, scales};
        parallel_for(groups, rows * shape.in * shape.out > SMALL ? threads : 1, [&](int64_t g) {
            group(weight, ready, shape, tail, g * ROWS, first, rows);
        });
    }
    std::free(staged);
    return true;
}

#include "vectors.h"
#include "by_lists.h"

// What the caller must know of the specialisation.
extern "C" const int32_t sparsefx_numbers[] = {BIAS, EXTRAS, N, M, INDEX_BITS, OF_W,
                                              SCALED, GROUP};

// x [batch, in], values [value_count], keys [out, row_bytes], row_ptr [out + 1] (bitmap only),
// scales [out, groups of columns] (SCALED only), bias [out], extras: pointers to
// [batch, out / OF_W], y the same; all contiguous, all of type Value but keys, row_ptr and values.
// Returns 0, or 1 if there is no memory for the copies it works on; out > 0.
extern "C" int32_t sparsefx_linear(const Value* x, const void* values, const uint8_t* keys,
                                   const int32_t* row_ptr, const Value* scales, const Value* bias,
                                   const Value* const* extras, Value* y, int64_t batch, int64_t in,
                                   int64_t out, int64_t row_bytes, int64_t value_count,
                                   int32_t threads) {
    const Shape shape{in, out, row_bytes, IS_INT4 ? 2 * value_count : value_count};
    const Tail tail{bias, extras, y, out / OF_W};
    Weight weight{values_in(values), keys, row_ptr, scales, 0, {}};
    void* padded = weight.pad(shape);
    const bool done = padded && way(shape, batch)(weight, x, shape, tail, batch, threads);
    std::free(padded);
    return done ? 0 : 1;
}
