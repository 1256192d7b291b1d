// y = conv2d(x, W) + bias on CPU, W [out, in * rows * columns] sparse: of each row the values that are
// kept and their columns. Sums are float32 for any Value.
//
// The default specialisation below lets this file compile as it is; a generated kernel has another.
#include "prelude.h"

// begin specialisation
using Value = float;
using Stored = Value;
extern "C" const char sparsefx_dtype[16] = "float32";
#include "openmp.h"
#include "stored.h"
#include "scalar.h"
// end specialisation

#include "vectors.h"
#include "meet.h"
#include "planes.h"

// Registers of pixels that a list of weights meets at a time; more would read past the first cache.
constexpr int VECTORS = FLOATS == 16 ? 4 : 8, MOST = VECTORS * FLOATS;
constexpr int64_t MOST_STAGED = 4 << 20;  // floats of several images
constexpr int64_t LAST = 0xFFFFFFFF;      // that offsets can tell

static float* floats(int64_t count) {
    return static_cast<float*>(std::aligned_alloc(64, (count / 16 + 1) * 64));
}

struct Weight {
    const float* values;
    const int32_t *columns, *row_ptr;
    const Value* bias;  // or nullptr
};

// Some images' convolution, of planes that lie ready.
struct Images {
    const Shape& shape;
    const Weight& weight;
    const Planes& planes;
    const float* x;
    const uint32_t* offsets;
    Value* y;  // of the first image

    // sums[lane] of one row of W and the pixels from `first` on.
    template <int COUNT>
    void row(int64_t o, int64_t first, float* sums) const {
        const int64_t from = weight.row_ptr[o], count = weight.row_ptr[o + 1] - from;
        const int32_t* columns = weight.columns + from;
        const float* base = x + first;
        const auto at = [&](int64_t i) { return base + offsets[columns[i]]; };
        std::memset(sums, 0, COUNT * FLOATS * sizeof(float));
        meet<COUNT>(weight.values + from, count, at, sums);
    }

    // FLOATS rows of W from `top` on, and COUNT registers of pixels from `first` on.
    template <int COUNT>
    void tile(int64_t top, int64_t first) const {
        alignas(64) float sums[FLOATS][MOST];
        const int64_t height = std::min<int64_t>(FLOATS, shape.out - top);
        // x that lies where it was ends with its last pixel.
        const int64_t base = planes.staged ? first : std::min(first, planes.pixels() - COUNT * FLOATS);
        for (int64_t r = 0; r < height; ++r) row<COUNT>(top + r, base, sums[r]);
        const Plane& plane = planes.plane;
        const int64_t last = std::min(first + COUNT * FLOATS, planes.pixels());
        for (int64_t p = first; p < last;) {
            const int64_t line = p / plane.width, column = p % plane.width;
            const int64_t image = line / plane.height, r = line % plane.height;
            const int64_t next = std::min(last, (line + 1) * plane.width);
            const int64_t count = std::min(next - p, plane.columns - column);
            if (r < plane.rows && count > 0)
                store(top, height, image, r * plane.columns + column, count, sums[0] + p - base);
            p = next;
        }
    }

    float bias(int64_t o) const { return weight.bias ? widen(weight.bias + o) : 0; }

    // `count` pixels of an image from `pixel` on.
    void store(int64_t top, int64_t height, int64_t image, int64_t pixel, int64_t count,
               const float* sums) const {
        const int64_t pixels = planes.plane.rows * planes.plane.columns;
        if (!shape.y_last) {
            for (int64_t r = 0; r < height; ++r, sums += MOST) {
                Value* to = y + (image * shape.out + top + r) * pixels + pixel;
                const float shift = bias(top + r);
                for (int64_t i = 0; i < count; ++i) narrow(sums[i] + shift, to + i);
            }
            return;
        }
        float shifts[FLOATS] = {};
        for (int64_t r = 0; r < height; ++r) shifts[r] = bias(top + r);
        Value* to = y + (image * pixels + pixel) * shape.out + top;
        for (int64_t p = 0; p < count; p += FLOATS) {
            Vector square[FLOATS];
#pragma GCC unroll 16
            for (int r = 0; r < FLOATS; ++r) square[r] = loaded<Vector>(sums + r * MOST + p);
            transpose(square);
            for (int64_t i = 0; i < std::min<int64_t>(FLOATS, count - p); ++i, to += shape.out) {
                float line[FLOATS];
                stored(square[i] + loaded<Vector>(shifts), line);
                if (height == FLOATS)
                    for (int r = 0; r < FLOATS; ++r) narrow(line[r], to + r);
                else
                    for (int64_t r = 0; r < height; ++r) narrow(line[r], to + r);
            }
        }
    }

    // `vectors` registers of pixels at a time.
    template <int COUNT>
    void run(int64_t vectors, int32_t threads) const {
        if constexpr (COUNT > 1)
            if (vectors < COUNT) return run<COUNT - 1>(vectors, threads);
        const int64_t width = COUNT * FLOATS, groups = (shape.out + FLOATS - 1) / FLOATS;
        const int64_t tiles = (planes.pixels() + width - 1) / width;
        parallel_for(tiles * groups, threads, [&](int64_t i) {
            tile<COUNT>(i % groups * FLOATS, i / groups * width);
        });
    }

    // As few registers as cover all pixels in as few tiles as there must be.
    void run(int32_t threads) const {
        const int64_t vectors = (planes.pixels() + FLOATS - 1) / FLOATS;
        const int64_t tiles = (vectors + VECTORS - 1) / VECTORS;
        run<VECTORS>((vectors + tiles - 1) / tiles, threads);
    }
};

// Whether x can be read where it lies.
static bool is_ready(const Shape& shape) {
    return std::is_same_v<Value, float> && shape.is_pointwise() && !shape.x_last &&
           shape.height * shape.width >= MOST;
}

static bool run_some(const Shape& shape, const Weight& weight, const Value* x, Value* y,
                     int64_t images, int32_t threads) {
    Planes planes{shape, Plane(shape), x, images, nullptr};
    if (planes.size() + planes.slack() > LAST) return false;
    auto* offsets = static_cast<uint32_t*>(std::malloc(shape.in * shape.rows * shape.columns * 4 + 1));
    const bool ready = is_ready(shape);
    if (!ready) planes.staged = floats(planes.size() + planes.slack());
    const bool done = offsets && (ready || planes.staged);
    if (done) {
        planes.fill_offsets(offsets, ready ? planes.pixels() : planes.apart());
        const int64_t rows = planes.plane.height;
        if (!ready)  // a thread stages about those pixels that it reads
            parallel_for(images * rows, threads, [&](int64_t i) { planes.stage(i / rows, i % rows); });
        const float* from = ready ? reinterpret_cast<const float*>(x) : planes.staged;
        Images{shape, weight, planes, from, offsets, y}.run(threads);
    }
    std::free(planes.staged);
    std::free(offsets);
    return done;
}

// Pixels that need no padding may lie in rows of any width: of some registers, if it can be.
static void flatten(Shape& shape) {
    const int64_t pixels = shape.height * shape.width;
    shape.width = std::min<int64_t>(pixels, MOST);
    while (pixels % shape.width) --shape.width;
    shape.height = pixels / shape.width;
}

// x [batch, in, height, width], y likewise, or channels last; values and columns [kept], row_ptr
// [out + 1], bias [out] or nullptr; sizes: those of Shape in order. Returns 0, or 1 if there is no
// memory for the planes; x and y are not empty.
extern "C" int32_t sparsefx_conv2d(const Value* x, const float* values, const int32_t* columns,
                                   const int32_t* row_ptr, const Value* bias, Value* y,
                                   const int64_t* sizes, int32_t threads) {
    Shape shape;
    std::memcpy(&shape, sizes, sizeof shape);
    const int64_t of_x = shape.in * shape.height * shape.width;
    const int64_t of_y = shape.out * shape.out_height() * shape.out_width();
    if (shape.is_pointwise()) flatten(shape);
    const Weight weight{values, columns, row_ptr, bias};
    const int64_t wanted = is_ready(shape) ? 1 : std::max<int64_t>(1, MOST_STAGED / of_x);
    for (int64_t first = 0; first < shape.batch; first += wanted) {
        const int64_t images = std::min(wanted, shape.batch - first);
        const int32_t workers = images * of_y * shape.in > SMALL ? threads : 1;
        if (!run_some(shape, weight, x + first * of_x, y + first * of_y, images, workers)) return 1;
    }
    return 0;
}
