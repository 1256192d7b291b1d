// The input of a convolution as zero-padded float32 planes, in which y of all pixels together is
//
//     y[o][p] = sum of w[o][c, i, j] * x[c][p + offset(c, i, j)]
//
// p counts pixels row by row with the pitch of x's planes, so that registers hold neighbouring p
// whatever the width; those behind the end of an output row are computed and dropped. A stride of 2
// parts x into planes of its even and odd rows and columns.
struct Shape {
    int64_t batch, in, height, width, out, rows, columns, stride, padding;  // rows, columns: of w
    int64_t x_last, y_last;  // whether channels lie side by side, [batch, height, width, channels]

    int64_t out_height() const { return (height + 2 * padding - rows) / stride + 1; }
    int64_t out_width() const { return (width + 2 * padding - columns) / stride + 1; }
    bool is_pointwise() const { return rows * columns == 1 && stride == 1 && !padding; }
};

// Where a pixel of y lies: a plane of x is `height` x `width`, of which y has `rows` x `columns`.
struct Plane {
    int64_t height, width, rows, columns, row_phases, column_phases;

    explicit Plane(const Shape& shape)
        : rows(shape.out_height()), columns(shape.out_width()),
          row_phases(std::min(shape.rows, shape.stride)),
          column_phases(std::min(shape.columns, shape.stride)) {
        height = rows + (shape.rows - 1) / shape.stride;
        width = columns + (shape.columns - 1) / shape.stride;
    }
    int64_t phases() const { return row_phases * column_phases; }
    int64_t pixels() const { return height * width; }
};

// Planes of some images side by side, [in][phases][images][height][width].
struct Planes {
    const Shape& shape;
    const Plane plane;
    const Value* x;  // of the first image
    int64_t images;
    float* staged;

    int64_t pixels() const { return images * plane.pixels(); }
    // From plane to plane: whole registers, so that those of a plane are aligned.
    int64_t pitch() const { return (pixels() + FLOATS - 1) / FLOATS * FLOATS; }
    int64_t size() const { return shape.in * apart(); }
    int64_t apart() const { return plane.phases() * pitch(); }  // of channels
    // What lanes behind the last pixel read.
    int64_t slack() const { return shape.rows * plane.width + shape.columns + 8 * FLOATS; }

    // From plane to plane of `apart` floats for each channel.
    void fill_offsets(uint32_t* offsets, int64_t apart) const {
        const int64_t s = shape.stride;
        for (int64_t c = 0; c < shape.in; ++c)
            for (int64_t i = 0; i < shape.rows; ++i)
                for (int64_t j = 0; j < shape.columns; ++j) {
                    const int64_t phase = i % s * plane.column_phases + j % s;
                    *offsets++ = c * apart + phase * pitch() + i / s * plane.width + j / s;
                }
    }

    // Row r of a plane of channel 0, and what of x is in it.
    struct Line {
        float* to;
        const Value* from;  // nullptr: all of it is padding
        int64_t before, count;
    };
    Line line(int64_t image, int64_t phase, int64_t r) const {
        const int64_t s = shape.stride, from = r * s + phase / plane.column_phases - shape.padding;
        const int64_t column = phase % plane.column_phases - shape.padding;
        const int64_t before = column < 0 ? (s - 1 - column) / s : 0;
        const int64_t end = (shape.width - column + s - 1) / s;
        float* to = staged + phase * pitch() + (image * plane.height + r) * plane.width;
        const int64_t first = column + before * s;  // of x
        const int64_t count = std::max<int64_t>(0, std::min(end, plane.width) - before);
        if (from < 0 || from >= shape.height || !count) return {to, nullptr, plane.width, 0};
        const int64_t row = image * (shape.x_last ? 1 : shape.in) * shape.height + from;
        const int64_t pixel = row * shape.width + first;
        return {to, x + pixel * (shape.x_last ? shape.in : 1), before, count};
    }

    // Row r of all planes of an image.
    void stage(int64_t image, int64_t r) const {
        for (int64_t phase = 0; phase < plane.phases(); ++phase) {
            Line next = line(image, phase, r);
            if (shape.x_last) stage_pixels(next);
            else
                for (int64_t c = 0; c < shape.in; ++c, next.to += apart()) {
                    stage_row(next);
                    if (next.from) next.from += shape.height * shape.width;
                }
        }
    }

    void pad(const Line& line, float* to) const {
        std::fill_n(to, line.before, 0.f);
        const int64_t end = line.before + line.count;
        std::fill_n(to + end, plane.width - end, 0.f);
    }

    void stage_row(const Line& line) const {
        pad(line, line.to);
        float* to = line.to + line.before;
        if (shape.stride == 1)
            for (int64_t i = 0; i < line.count; ++i) to[i] = widen(line.from + i);
        else
            for (int64_t i = 0; i < line.count; ++i) to[i] = widen(line.from + 2 * i);
    }

    void stage_pixels(const Line& line) const {
        for (int64_t c = 0; c < shape.in; ++c) pad(line, line.to + c * apart());
        const int64_t next = shape.stride * shape.in;
        for (int64_t p = 0; p < line.count; p += FLOATS)
            for (int64_t c = 0; c < shape.in; c += FLOATS)
                stage_square(line.from + p * next + c, std::min<int64_t>(FLOATS, line.count - p),
                             std::min<int64_t>(FLOATS, shape.in - c),
                             line.to + c * apart() + line.before + p);
    }

    void stage_square(const Value* from, int64_t count, int64_t channels, float* to) const {
        Vector square[FLOATS];
        turned(from, shape.stride * shape.in, count, channels, square);
        for (int64_t c = 0; c < channels; ++c, to += apart())
            if (count == FLOATS) stored(square[c], to);
            else
                for (int64_t i = 0; i < count; ++i) to[i] = square[c][i];
    }
};
