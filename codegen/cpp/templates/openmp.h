// body(i) for each i of [0, count), on at most `threads` threads, those of OpenMP. What shares out a
// kernel's work must call this, and nothing else of OpenMP: in a library for onnxruntime another
// header stands here, which takes onnxruntime's threads.
template <class Body>
static inline void parallel_for(int64_t count, int32_t threads, const Body& body) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < count; ++i) body(i);
}
