// body(i) for each i of [0, count), on onnxruntime's threads; it shares them out.
template <class Body>
static inline void parallel_for(int64_t count, int32_t threads, const Body& body) {
    if (threads > 1 && sparsefx::pool && count > 1) {
        const auto task = [](void* data, size_t i) { (*static_cast<const Body*>(data))(i); };
        sparsefx::pool->run(*sparsefx::pool, task, count, const_cast<Body*>(&body));
        return;
    }
    for (int64_t i = 0; i < count; ++i) body(i);
}
