// The operators sparsefx::NMLinear and sparsefx::BitmapLinear of a model, for onnxruntime:
//
//     y = epilogue(x W^T + bias)      x, values, codes or gaps, bias?, extras... -> y
//
// They stand in for the model-local functions of these names. The default specialisation below has
// no kernels and lets this file compile as it is; a generated library names its own.
#include <sched.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "abi.h"
#include "kernel.h"

namespace sparsefx {
__thread const Pool* pool = nullptr;
}

struct Choice {
    bool (*runs_here)();
    const sparsefx::Kernel* kernel;
};

// begin specialisation
static const std::vector<Choice> CHOICES = {};  // the best instruction set first
// end specialisation

#include "tensors.h"
#include "weight.h"

// onnxruntime says no number of threads; it never uses more than there are processors.
static int processors() {
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) ? 1 : CPU_COUNT(&set);
}

// A call, as its pool knows it.
struct Call {
    const OrtApi& api;
    const OrtKernelContext* handle;
    OrtStatus* failed = nullptr;
};

static void run_on_pool(const sparsefx::Pool& pool, void (*task)(void*, size_t), size_t count,
                        void* data) {
    auto& call = *static_cast<Call*>(pool.call);
    OrtStatus* failed = call.api.KernelContext_ParallelFor(call.handle, task, count, 0, data);
    if (failed) call.failed = failed;
}

struct Operator : OrtCustomOp {
    const char* name;
    ElementType type;
};

// One node of a session.
struct Node {
    const OrtApi& api;
    const Operator& op;
    std::string name;
    const sparsefx::Kernel* kernel = nullptr;
    Weight weight;

    OrtStatus* wrong(const std::string& what) const {
        const std::string text = "sparsefx::" + std::string(op.name) + " " + name + ": " + what;
        return api.CreateStatus(INVALID_ARGUMENT, text.c_str());
    }
    [[noreturn]] void fail(const std::string& what) const { throw Failure{wrong(what)}; }

    Tensor constant(const OrtKernelInfo* info, size_t place) const {
        int is_constant = 0;
        const OrtValue* value = nullptr;
        must(api.KernelInfoGetConstantInput_tensor(info, place, &is_constant, &value));
        if (!is_constant || !value) fail("its weight must be a constant of the file");
        return tensor_of(api, value);
    }

    // Reads the shape of the weight and prepares it.
    void prepare(const OrtKernelInfo* info);
    void choose(const OrtKernelInfo* info, int64_t n, int64_t m, double density);
    void compute(OrtKernelContext* handle) const;
};

static bool is_nm(const Operator& op) { return !std::strcmp(op.name, "NMLinear"); }

void Node::choose(const OrtKernelInfo* info, int64_t n, int64_t m, double density) {
    const std::string epilogue = text_of(api, info, "epilogue");
    size_t inputs = 0;
    must(api.KernelInfo_GetInputCount(info, &inputs));
    const sparsefx::Kernel* best = nullptr;
    for (const Choice& choice : CHOICES) {
        const sparsefx::Kernel& k = *choice.kernel;
        const bool same = !std::strcmp(k.op, op.name) && k.type == op.type && k.n == n &&
                          k.m == m && epilogue == k.epilogue &&
                          inputs == size_t(3 + k.has_bias + k.extras);
        if (!same || !choice.runs_here()) continue;
        if (best && std::strcmp(best->isa, k.isa)) break;  // a lesser instruction set
        const double gap = std::fabs(k.density - density);
        if (!best || gap < std::fabs(best->density - density)) best = &k;
    }
    if (!best)
        fail("no kernel for it in this library: export the model again with its library, and "
             "register the one that came with this file");
    kernel = best;
}

void Node::prepare(const OrtKernelInfo* info) {
    const Tensor values = constant(info, 1), keys = constant(info, 2);
    const auto* bytes = static_cast<const uint8_t*>(keys.data);
    const char* bad = nullptr;
    if (is_nm(op)) {
        int64_t n = 0, m = 0;
        must(api.KernelInfoGetAttribute_int64(info, "n", &n));
        must(api.KernelInfoGetAttribute_int64(info, "m", &m));
        choose(info, n, m, double(n) / double(m));
        if (values.dims.size() != 2 || keys.dims.size() != 2 || keys.dims[0] != values.dims[0])
            fail("values and codes must be [out, ...], not " + text_of(values.dims) + " and " +
                 text_of(keys.dims));
        weight.out = values.dims[0];
        weight.in = values.dims[1] / n * m;
        if (values.dims[1] % n || !weight.out) fail("its values are not groups of n");
        bad = from_codes(bytes, keys.dims[1], *kernel, weight);
    } else {
        int64_t shape[2] = {};
        size_t size = 2;
        must(api.KernelInfoGetAttributeArray_int64(info, "shape", shape, &size));
        weight.out = shape[0], weight.in = shape[1];
        if (size != 2 || values.dims.size() != 1 || keys.dims != values.dims)
            fail("values and gaps must be of one length, not " + text_of(values.dims) + " and " +
                 text_of(keys.dims));
        choose(info, 0, 0, double(values.dims[0]) / (double(weight.out) * double(weight.in)));
        bad = from_gaps(bytes, values.dims[0], weight);
    }
    if (bad) fail(bad);
}

void Node::compute(OrtKernelContext* handle) const {
    const Tensor x = input_of(api, handle, 0), values = input_of(api, handle, 1);
    if (x.dims.empty() || x.dims.back() != weight.in)
        fail("x " + text_of(x.dims) + " must end in " + std::to_string(weight.in));
    std::vector<int64_t> dims = x.dims;
    dims.back() = weight.out;
    Tensor bias;
    if (kernel->has_bias) {
        bias = input_of(api, handle, 3);
        if (bias.dims != std::vector<int64_t>{weight.out}) fail("bias is " + text_of(bias.dims));
    }
    std::vector<const void*> extras(kernel->extras);
    for (int i = 0; i < kernel->extras; ++i) {
        const Tensor extra = input_of(api, handle, 3 + kernel->has_bias + i);
        if (extra.dims != dims)
            fail("extra " + text_of(extra.dims) + " is not of the result's shape " + text_of(dims));
        extras[i] = extra.data;
    }
    OrtValue* y = nullptr;
    must(api.KernelContext_GetOutput(handle, 0, dims.data(), dims.size(), &y));
    if (!x.rows()) return;
    Call call{api, handle};
    const sparsefx::Pool pool{&call, run_on_pool};
    static const int threads = processors();
    sparsefx::pool = &pool;
    const int32_t failed = kernel->run(
        x.data, values.data, weight.keys.data(), weight.row_ptr.data(), bias.data, extras.data(),
        data_of(api, y), x.rows(), weight.in, weight.out, weight.row_bytes, weight.value_count,
        threads);
    sparsefx::pool = nullptr;
    must(call.failed);
    if (failed) throw std::bad_alloc();
}

// No exception may reach onnxruntime.
template <class Body>
static OrtStatus* guarded(const OrtApi& api, const Body& body) {
    try {
        body();
        return nullptr;
    } catch (const Failure& failure) {
        return failure.status;
    } catch (const std::exception&) {
        return api.CreateStatus(FAIL, "sparsefx: no memory for a sparse linear");
    }
}

static OrtStatus* create(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info,
                         void** kernel) {
    return guarded(*api, [&] {
        const auto& own = *static_cast<const Operator*>(op);
        std::unique_ptr<Node> node(new Node{*api, own, name_of(*api, info), nullptr, {}});
        node->prepare(info);
        *kernel = node.release();
    });
}

static OrtStatus* compute(void* kernel, OrtKernelContext* context) {
    const Node& node = *static_cast<const Node*>(kernel);
    return guarded(node.api, [&] { node.compute(context); });
}

static Operator make(const char* name, ElementType type) {
    Operator op = {};
    op.version = API_VERSION;
    op.name = name;
    op.type = type;
    op.GetName = [](const OrtCustomOp* o) { return static_cast<const Operator*>(o)->name; };
    op.GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
    op.GetInputType = [](const OrtCustomOp* o, size_t i) {
        return i == 2 ? UINT8 : static_cast<const Operator*>(o)->type;
    };
    op.GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return 4; };
    op.GetOutputType = [](const OrtCustomOp* o, size_t) {
        return static_cast<const Operator*>(o)->type;
    };
    op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
    op.GetInputCharacteristic = [](const OrtCustomOp*, size_t i) {
        return i == 3 ? VARIADIC : REQUIRED;
    };
    op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return REQUIRED; };
    op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
    op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 0; };
    op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
    op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
    op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
    op.CreateKernelV2 = create;
    op.KernelComputeV2 = compute;
    op.KernelDestroy = [](void* kernel) { delete static_cast<Node*>(kernel); };
    op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
    op.GetEndVersion = [](const OrtCustomOp*) { return INT32_MAX; };
    return op;
}

static const Operator OPERATORS[] = {make("NMLinear", FLOAT), make("NMLinear", FLOAT16),
                                     make("BitmapLinear", FLOAT), make("BitmapLinear", FLOAT16)};

// The domain lives as long as the process: sessions refer to it. One for each onnxruntime in it.
static OrtCustomOpDomain* domain_of(const OrtApi& api) {
    static std::mutex guard;
    static std::map<const OrtApi*, OrtCustomOpDomain*> domains;
    const std::lock_guard<std::mutex> lock(guard);
    OrtCustomOpDomain*& domain = domains[&api];
    if (!domain) {
        OrtCustomOpDomain* made = nullptr;
        must(api.CreateCustomOpDomain("sparsefx", &made));
        for (const Operator& op : OPERATORS) must(api.CustomOpDomain_Add(made, &op));
        domain = made;
    }
    return domain;
}

// What onnxruntime's register_custom_ops_library() calls.
extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(
    OrtSessionOptions* options, const OrtApiBase* base) {
    const OrtApi* api = base->GetApi(API_VERSION);
    if (!api) {
        const std::string text = std::string("sparsefx: this library needs onnxruntime 1.17 or "
                                             "newer, and this is ") + base->GetVersionString();
        const OrtApi* oldest = base->GetApi(1);
        return oldest ? oldest->CreateStatus(FAIL, text.c_str()) : nullptr;
    }
    return guarded(*api, [&] { must(api->AddCustomOpDomain(options, domain_of(*api))); });
}
