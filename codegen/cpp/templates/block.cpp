// y = epilogue(x W^T) on CPU, with W [out, in] stored as dense blocks of BLOCK_ROWS x BLOCK_COLS:
// values [blocks][BLOCK_ROWS][BLOCK_COLS] row of blocks by row of blocks, and the block column of
// each, ascending in a row of blocks. Sums are float32 for any Value.
//
// The default specialisation below lets this file compile as it is; a generated kernel has another.
#include "prelude.h"
#include <numeric>
#include "activations.h"

// begin specialisation
using Value = float;
using Stored = Value;
extern "C" const char sparsefx_dtype[16] = "float32";
constexpr int BLOCK_ROWS = 16, BLOCK_COLS = 16;
constexpr int BIAS = 0, EXTRAS = 0;
constexpr int OF_W = 1;  // rows of W that make a feature of y: 2 where one gates the other
#include "openmp.h"
#include "stored.h"
#include "scalar.h"

static inline float epilogue(const float* sums, int64_t, int64_t, const Value*,
                             const Value* const*) {
    return sums[0];
}
// end specialisation

struct Shape {
    int64_t in, out;
};

struct Weight {
    const Value* values;
    const int32_t *columns, *row_ptr;
};

#include "vectors.h"
constexpr int SIDE = FLOATS == 16 ? 4 : 2;  // rows of W whose sums registers hold
#ifdef __AVX512BF16__
constexpr bool PAIRS = std::is_same_v<Value, bf16> && BLOCK_COLS % 2 == 0;
#else
constexpr bool PAIRS = false;
#endif
#include "tail.h"
#include "cut.h"
#include "blocks.h"
#include "many_rows.h"

static inline float total(const Vector& vector) {
    float sum = 0;
    for (int i = 0; i < FLOATS; ++i) sum += vector[i];
    return sum;
}

// HEIGHT rows of W from `top` on by BATCH rows of x: lanes are columns.
template <int BATCH>
static void rows_by_batch(const Weight& weight, const Value* x, const Shape& shape,
                          const Tail& tail, int64_t top, int64_t first) {
    Vector acc[BATCH][HEIGHT] = {};
    const int64_t row = top % BLOCK_ROWS;
    const int32_t* bounds = weight.row_ptr + top / BLOCK_ROWS;
    for (int64_t b = bounds[0]; b < bounds[1]; ++b) {
        const Value* w = weight.values + (b * BLOCK_ROWS + row) * BLOCK_COLS;
        const Value* at = x + first * shape.in + int64_t(weight.columns[b]) * BLOCK_COLS;
        for (int c = 0; c < BLOCK_COLS; c += FLOATS)
#pragma GCC unroll 4
            for (int r = 0; r < HEIGHT; ++r) {
                const Vector weights = widened(w + r * BLOCK_COLS + c);
#pragma GCC unroll 4
                for (int i = 0; i < BATCH; ++i)
                    acc[i][r] += weights * widened(at + i * shape.in + c);
            }
    }
    for (int i = 0; i < BATCH; ++i) {
        float sums[HEIGHT];
        for (int r = 0; r < HEIGHT; ++r) sums[r] = total(acc[i][r]);
        tail.store(sums, HEIGHT, top, first + i);
    }
}

static void few_rows(const Weight& weight, const Value* x, const Shape& shape, const Tail& tail,
                     int64_t first, int64_t batch, int32_t threads) {
    const int64_t work = (batch - first) * shape.in * shape.out;
    parallel_for(shape.out / HEIGHT, work > SMALL ? threads : 1, [&](int64_t i) {
        int64_t row = first;
        for (; row + 4 <= batch; row += 4)
            rows_by_batch<4>(weight, x, shape, tail, i * HEIGHT, row);
        for (; row < batch; ++row) rows_by_batch<1>(weight, x, shape, tail, i * HEIGHT, row);
    });
}

// What the caller must know of the specialisation.
extern "C" const int32_t sparsefx_numbers[] = {BIAS, EXTRAS, BLOCK_ROWS, BLOCK_COLS, OF_W};

// x [batch, in], values, columns [blocks], row_ptr [out / BLOCK_ROWS + 1], bias [out], extras: pointers
// to [batch, out / OF_W], y the same; all contiguous. Whole registers of rows of x are transposed; what
// is left is multiplied along the columns, if those of a block fill registers. Returns 0, or 1 if
// there is no memory for the copies it works on; out > 0.
extern "C" int32_t sparsefx_block_linear(const Value* x, const Value* values,
                                         const int32_t* columns, const int32_t* row_ptr,
                                         const Value* bias, const Value* const* extras, Value* y,
                                         int64_t batch, int64_t in, int64_t out, int32_t threads) {
    const Shape shape{in, out};
    const Tail tail{bias, extras, y, out / OF_W};
    const Weight weight{values, columns, row_ptr};
    const int64_t whole = BLOCK_COLS % FLOATS ? batch : batch / FLOATS < 2 ? 0 : batch - batch % FLOATS;
    if (!many_rows(weight, x, shape, tail, whole, threads)) return 1;
    if (whole < batch) few_rows(weight, x, shape, tail, whole, batch, threads);
    return 0;
}
