// The kernel as the table knows it.
int32_t run(const void* x, const void* values, const uint8_t* keys, const int32_t* row_ptr,
            const void* bias, const void* const* extras, void* y, int64_t batch, int64_t in,
            int64_t out, int64_t row_bytes, int64_t value_count, int32_t threads) {
    return sparsefx_linear(static_cast<const Value*>(x), values, keys, row_ptr,
                           /*scales=*/nullptr, static_cast<const Value*>(bias),
                           reinterpret_cast<const Value* const*>(extras), static_cast<Value*>(y),
                           batch, in, out, row_bytes, value_count, threads);
}
