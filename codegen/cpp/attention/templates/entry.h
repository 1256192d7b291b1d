// The library's one function; returns 0, or 1 if there is no memory for what it works on.
extern "C" int32_t sparsefx_attention(const Problem* problem) {
    try {
        return problem->queries == 1 ? decode(*problem) : prefill(*problem);
    } catch (const std::bad_alloc&) {
        return 1;
    }
}
