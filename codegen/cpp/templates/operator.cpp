// The operators sparsefx_cpp::linear and sparsefx_rows::linear where nothing is out of the ordinary: a
// kernel that this process has loaded, and tensors that its C function may read as they are. All other
// calls go on to the operators' other kernels, which are Python: they load, copy, or say what is wrong.
//
// BackendSelect is the last key before those of devices, so that autograd, functionalisation and
// torch's modes have had their turn, and where this code is not loaded nothing is missing.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/ops/linear.h>
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

using Arguments = c10::ArrayRef<IValue>;

static Named<Kernel>& kernels() {
    static Named<Kernel> all;
    return all;
}

static const Routes& routes_of(const std::string& text) {
    static Named<Routes> all;
    const Routes* found = all.find(text);
    return found ? *found : *all.add(text, Reader(text).routes());
}

// The result, or an undefined tensor if this code leaves the call to others; so do those below.
static at::Tensor computed(const Call& call, const std::string& handle) {
    const Kernel* kernel = kernels().find(handle);
    if (!kernel || !kernel->takes(call)) return {};
    const auto type = c10::typeMetaToScalarType(call.x.dtype());
    at::Tensor y(at::detail::empty_cpu(call.sizes(), type));
    return !y.numel() || kernel->run(call, y.mutable_data_ptr(), call.rows()) ? y : at::Tensor();
}

static at::Tensor linear(Arguments given) {
    const Call call(given[0], given[1], given[2], given[3], given[5]);
    return computed(call, given[4].toStringRef());
}

static at::Tensor picked(Call call, const Pick& pick) {
    Few<const TensorImpl*> packed;
    for (const int64_t place : pick.tensors) {
        if (place < 0 || static_cast<size_t>(place) >= call.packed.size()) return {};
        packed.push_back(call.packed[place]);
    }
    call.packed = packed;
    return pick.is_ours ? computed(call, pick.handle) : at::Tensor();
}

static at::Tensor by_rows(Arguments given) {
    const Routes& routes = routes_of(given[5].toStringRef());
    const Call call(given[0], given[1], given[3], given[4], given[6]);
    if (routes.ranges.empty() || !call.x.dim()) return {};
    const int64_t rows = call.rows();
    for (const Pick& pick : routes.at(rows).picks)
        if (rows % pick.multiple == 0) return picked(call, pick);
    if (routes.is_unpacked || given[2].isNone() || !call.extras.empty()) return {};
    const at::Tensor& weight = given[2].toTensor();
    return at::linear(given[0].toTensor(), routes.transposed ? weight.t() : weight,
                      given[3].toOptional<at::Tensor>());
}

// An operator of COUNT arguments for tensors of the CPU.
template <size_t COUNT, at::Tensor (*compute)(Arguments)>
static void unless_unusual(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                           torch::jit::Stack* stack) {
    using c10::DispatchKey;
    using c10::DispatchKeySet;
    const auto rest = keys & DispatchKeySet(DispatchKeySet::FULL_AFTER, DispatchKey::BackendSelect);
    at::Tensor y;
    if (rest.highestPriorityTypeId() == DispatchKey::CPU) y = compute(torch::jit::last(*stack, COUNT));
    if (!y.defined()) return op.redispatchBoxed(rest, stack);
    torch::jit::drop(*stack, COUNT);
    stack->emplace_back(std::move(y));
}

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
