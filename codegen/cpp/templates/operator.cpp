// The operators sparsefx_cpp::linear and sparsefx_rows::linear where nothing is out of the ordinary: a
// kernel that this process has loaded, and tensors that its C function may read as they are. All other
// calls go on to Python, which loads, copies, or says what is wrong. There are two ways in: by torch's
// dispatcher (operator_boxed.h), and past it from Inductor's generated code (operator_direct.h).
#include <ATen/Parallel.h>
#include <c10/util/accumulate.h>
#include <torch/library.h>

#include <dlfcn.h>

#include <algorithm>
#include <charconv>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "operator_named.h"
#include "operator_call.h"
#include "operator_kernels.h"
#include "operator_routes.h"

static Named<Kernel>& kernels() {
    static Named<Kernel> all;
    return all;
}

static const Routes& routes_of(const std::string& text) {
    static Named<Routes> all;
    const Routes* found = all.find(text);
    return found ? *found : *all.add(text, Reader(text).routes());
}

static const Kernel* taker(const Call& call, const std::string& handle) {
    const Kernel* kernel = kernels().find(handle);
    return kernel && kernel->takes(call) ? kernel : nullptr;
}

// Who computes a call: neither of the two, and it is left to others.
struct Choice {
    const Kernel* kernel = nullptr;
    bool is_dense = false;
};

// By the pick, which is what `call` is narrowed to.
static const Kernel* picked(Call& call, const Pick& pick) {
    Few<const TensorImpl*> packed;
    for (const int64_t place : pick.tensors) {
        if (place < 0 || static_cast<size_t>(place) >= call.packed.size()) return nullptr;
        packed.push_back(call.packed[place]);
    }
    call.packed = packed;
    return pick.is_ours ? taker(call, pick.handle) : nullptr;
}

static Choice choice(Call& call, const Routes& routes) {
    if (routes.ranges.empty() || !call.x.dim()) return {};
    const int64_t rows = call.rows();
    for (const Pick& pick : routes.at(rows).picks)
        if (rows % pick.multiple == 0) return {picked(call, pick), false};
    return {nullptr, !routes.is_unpacked && call.extras.empty()};
}

#include "operator_boxed.h"
#if __has_include(<Python.h>)
#include "operator_direct.h"
#endif

// From now on calls of `handle` need no Python.
extern "C" void sparsefx_add(const char* handle, void* library) {
    kernels().add(handle, kernel_of(library));
}

TORCH_LIBRARY_IMPL(sparsefx_cpp, BackendSelect, m) {
    m.impl("linear", torch::CppFunction::makeFromBoxedFunction<&unless_unusual<6, linear>>());
}

TORCH_LIBRARY_IMPL(sparsefx_rows, BackendSelect, m) {
    m.impl("linear", torch::CppFunction::makeFromBoxedFunction<&unless_unusual<7, by_rows>>());
}
