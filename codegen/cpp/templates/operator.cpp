// The operator sparsefx_cpp::linear where nothing is out of the ordinary: a kernel that this process
// has loaded, and tensors that its C function may read as they are. All other calls go on to the
// operator's kernel for the CPU, which is Python: it loads, copies, or says what is wrong.
//
// BackendSelect is the last key before those of devices, so that autograd, functionalisation and
// torch's modes have had their turn, and where this code is not loaded nothing is missing.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <dlfcn.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <unordered_map>

#include "operator_call.h"
#include "operator_kernels.h"

using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::OperatorHandle;
using torch::jit::Stack;

static at::Tensor empty(const Call& call) {
    return at::Tensor(at::detail::empty_cpu(call.sizes(), c10::typeMetaToScalarType(call.x.dtype())));
}

// The result, or an undefined tensor if it is not for this code.
static at::Tensor computed(const Call& call, const Kernel* kernel) {
    if (!kernel || !kernel->takes(call)) return {};
    at::Tensor y = empty(call);
    const bool done = !y.numel() || kernel->run(call, y.mutable_data_ptr(), y.numel() / call.features);
    return done ? y : at::Tensor();
}

static void linear(const OperatorHandle& op, DispatchKeySet keys, Stack* stack) {
    constexpr size_t COUNT = 6;
    const auto rest = keys & DispatchKeySet(DispatchKeySet::FULL_AFTER, DispatchKey::BackendSelect);
    at::Tensor y;
    if (rest.highestPriorityTypeId() == DispatchKey::CPU) {
        const auto given = torch::jit::last(*stack, COUNT);
        const TensorImpl* bias = given[2].isNone() ? nullptr : given[2].unsafeToTensorImpl();
        const Call call{*given[0].unsafeToTensorImpl(), tensors(given[1]), bias, tensors(given[3]),
                        given[5].toInt()};
        y = computed(call, kernels().find(given[4].toStringRef()));
    }
    if (!y.defined()) return op.redispatchBoxed(rest, stack);
    torch::jit::drop(*stack, COUNT);
    stack->emplace_back(std::move(y));
}

// From now on calls of `handle` need no Python. library: as dlopen returned it.
extern "C" void sparsefx_add(const char* handle, void* library) { kernels().add(handle, library); }

TORCH_LIBRARY_IMPL(sparsefx_cpp, BackendSelect, m) {
    m.impl("linear", torch::CppFunction::makeFromBoxedFunction<&linear>());
}
