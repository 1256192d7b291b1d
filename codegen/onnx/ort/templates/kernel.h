// What a generated kernel and the operators that call it know of each other.
namespace sparsefx {

// onnxruntime's threads, for the length of one call.
struct Pool {
    void* call;
    void (*run)(const Pool&, void (*task)(void*, size_t), size_t count, void* data);
};
extern __thread const Pool* pool;  // what the call that this thread is in may use

// A kernel and what it was specialised to; `run` is its sparsefx_linear().
struct Kernel {
    const char* op;  // "NMLinear" or "BitmapLinear"
    const char* epilogue;
    const char* isa;
    int type, n, m, has_bias, extras, index_bits;  // type: ElementType of x, values and y
    double density;                                // of the weights that it was generated for
    int32_t (*run)(const void* x, const void* values, const uint8_t* keys, const int32_t* row_ptr,
                   const void* bias, const void* const* extras, void* y, int64_t batch, int64_t in,
                   int64_t out, int64_t row_bytes, int64_t value_count, int32_t threads);
};

}  // namespace sparsefx
