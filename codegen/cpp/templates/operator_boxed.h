// By the dispatcher. BackendSelect is the last key before those of devices, so that autograd,
// functionalisation and torch's modes have had their turn, and where this is not loaded nothing is missing.
#include <ATen/EmptyTensor.h>
#include <ATen/ops/linear.h>

using Arguments = c10::ArrayRef<IValue>;

static Few<const TensorImpl*> tensors(const IValue& list) {
    Few<const TensorImpl*> found;
    for (const IValue& each : list.toListRef()) found.push_back(each.unsafeToTensorImpl());
    return found;
}

static Call boxed(const IValue& x, const IValue& packed, const IValue& bias, const IValue& extras,
                  const IValue& features) {
    const TensorImpl* added = bias.isNone() ? nullptr : bias.unsafeToTensorImpl();
    return {*x.unsafeToTensorImpl(), tensors(packed), added, tensors(extras), features.toInt()};
}

// The result, or an undefined tensor if this code leaves the call to others; so do those below.
static at::Tensor computed(const Call& call, const Kernel* kernel) {
    if (!kernel) return {};
    const auto type = c10::typeMetaToScalarType(call.x.dtype());
    at::Tensor y(at::detail::empty_cpu(call.sizes(), type));
    return !y.numel() || kernel->run(call, y.mutable_data_ptr(), call.rows()) ? y : at::Tensor();
}

static at::Tensor linear(Arguments given) {
    const Call call = boxed(given[0], given[1], given[2], given[3], given[5]);
    return computed(call, taker(call, given[4].toStringRef()));
}

static at::Tensor by_rows(Arguments given) {
    const Routes& routes = routes_of(given[5].toStringRef());
    Call call = boxed(given[0], given[1], given[3], given[4], given[6]);
    const Choice made = choice(call, routes);
    if (!made.is_dense || given[2].isNone()) return computed(call, made.kernel);
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
