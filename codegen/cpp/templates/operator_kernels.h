// The generated kernels that this process has loaded, and the tensors that each takes as they are.
// What a kernel says of itself lies in its library: see the ends of linear.cpp and block.cpp.

static const std::unordered_map<std::string, ScalarType> TYPES = {
    {"float32", ScalarType::Float}, {"bfloat16", ScalarType::BFloat16},
    {"float16", ScalarType::Half},  {"int8", ScalarType::Char},
    {"int4", ScalarType::Byte},  // two in a byte
};

struct Kernel {
    virtual ~Kernel() = default;
    // Whether its C function can be called.
    virtual bool takes(const Call& call) const = 0;
    // Calls it for `rows` rows, if they have any number to compute; whether there was memory.
    virtual bool run(const Call& call, void* y, int64_t rows) const = 0;
};

static Few<const void*> addresses(const Few<const TensorImpl*>& tensors) {
    Few<const void*> found;
    for (const TensorImpl* each : tensors) found.push_back(each->data());
    return found;
}

static const void* address(const TensorImpl* tensor) { return tensor ? tensor->data() : nullptr; }

struct LinearKernel : Kernel {
    struct Numbers {
        int32_t has_bias, extras, n, m, index_bits, of_w, scaled, group;
    };
    using Function = int32_t(const void* x, const void* values, const void* keys,
                             const void* row_ptr, const void* scales, const void* bias,
                             const void* const* extras, void* y, int64_t batch, int64_t in,
                             int64_t out, int64_t row_bytes, int64_t value_count, int32_t threads);
    Function* function;
    Numbers numbers;
    ScalarType type, stored;

    LinearKernel(void* function, const void* numbers, ScalarType type, ScalarType stored)
        : function(reinterpret_cast<Function*>(function)),
          numbers(*static_cast<const Numbers*>(numbers)), type(type), stored(stored) {}

    int64_t kept(int64_t in) const { return in / numbers.m * numbers.n; }

    int64_t row_bytes(int64_t in) const {
        return ((numbers.index_bits ? kept(in) * numbers.index_bits : in) + 7) / 8;
    }

    int64_t of_row(int64_t in) const {  // values, or bytes of 4-bit ones
        return stored == ScalarType::Byte ? (kept(in) + 1) / 2 : kept(in);
    }

    int64_t groups(int64_t in) const {
        return numbers.group ? (in + numbers.group - 1) / numbers.group : 1;
    }

    bool takes(const Call& call) const override {
        const int64_t out = call.features * numbers.of_w;
        if (!call.fits(type, out, numbers.has_bias, numbers.extras)) return false;
        const auto& packed = call.packed;
        const int64_t in = call.in();
        if (packed.size() != 2u + !numbers.n + numbers.scaled) return false;
        if (!lies(*packed[0], stored)) return false;
        if (!lies(*packed[1], ScalarType::Byte, {out, row_bytes(in)})) return false;
        if (numbers.scaled && !lies(*packed.back(), type, {out, groups(in)})) return false;
        return numbers.n ? packed[0]->numel() == out * of_row(in)
                         : lies(*packed[2], ScalarType::Int, {out + 1});
    }

    bool run(const Call& call, void* y, int64_t rows) const override {
        const auto& packed = call.packed;
        const int64_t in = call.in(), out = call.features * numbers.of_w;
        return !function(call.x.data(), packed[0]->data(), packed[1]->data(),
                         numbers.n ? nullptr : packed[2]->data(),
                         numbers.scaled ? packed.back()->data() : nullptr, address(call.bias),
                         addresses(call.extras).data(), y, rows, in, out, row_bytes(in),
                         packed[0]->numel(), at::get_num_threads());
    }
};

struct BlockKernel : Kernel {
    struct Numbers {
        int32_t has_bias, extras, rows, cols, of_w;
    };
    using Function = int32_t(const void* x, const void* values, const void* columns,
                             const void* row_ptr, const void* bias, const void* const* extras,
                             void* y, int64_t batch, int64_t in, int64_t out, int32_t threads);
    Function* function;
    Numbers numbers;
    ScalarType type;

    BlockKernel(void* function, const void* numbers, ScalarType type)
        : function(reinterpret_cast<Function*>(function)),
          numbers(*static_cast<const Numbers*>(numbers)), type(type) {}

    bool takes(const Call& call) const override {
        const int64_t out = call.features * numbers.of_w;
        if (!call.fits(type, out, numbers.has_bias, numbers.extras)) return false;
        const auto& packed = call.packed;
        if (packed.size() != 3 || call.in() % numbers.cols || out % numbers.rows) return false;
        const int64_t blocks = packed[1]->numel();
        return lies(*packed[0], type, {blocks, numbers.rows, numbers.cols}) &&
               lies(*packed[1], ScalarType::Int, {blocks}) &&
               lies(*packed[2], ScalarType::Int, {out / numbers.rows + 1});
    }

    bool run(const Call& call, void* y, int64_t rows) const override {
        const auto& packed = call.packed;
        return !function(call.x.data(), packed[0]->data(), packed[1]->data(), packed[2]->data(),
                         address(call.bias), addresses(call.extras).data(), y, rows, call.in(),
                         call.features * numbers.of_w, at::get_num_threads());
    }
};

// What `library`, as dlopen returned it, holds.
static std::unique_ptr<const Kernel> kernel_of(void* library) {
    const auto type = [&](const char* name) {
        const void* text = dlsym(library, name);
        return text ? TYPES.at(static_cast<const char*>(text)) : ScalarType::Undefined;
    };
    const void* numbers = dlsym(library, "sparsefx_numbers");
    if (void* function = dlsym(library, "sparsefx_block_linear"))
        return std::make_unique<BlockKernel>(function, numbers, type("sparsefx_dtype"));
    void* function = dlsym(library, "sparsefx_linear");
    return std::make_unique<LinearKernel>(function, numbers, type("sparsefx_dtype"),
                                          type("sparsefx_stored"));
}
