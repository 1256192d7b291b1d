// Past the dispatcher, from Inductor's generated code, which is Python: builtin functions
//
//     linear(x, *tensors, handle, packed, has_weight, has_bias, out=...)
//     by_rows(x, *tensors, routes, packed, has_weight, has_bias, out=...)
//
// where `tensors` are so many stored ones, the dense weight, the bias, and operands of the epilogue.
// They write into memory that Inductor has planned. What is unusual is left to functions in Python.
// Between two kernels that sweep the caches each line of code is a miss, and an operator has many.
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/python_variable.h>

namespace direct {

struct Given {
    Few<const at::Tensor*> tensors;  // x, then the others
    PyObject* text;
    size_t packed;
    bool has_weight, has_bias;
    const at::Tensor* out;

    const at::Tensor& x() const { return *tensors[0]; }

    const at::Tensor* weight() const { return has_weight ? tensors[1 + packed] : nullptr; }

    const at::Tensor* bias() const { return has_bias ? tensors[1 + packed + has_weight] : nullptr; }

    Call call() const {
        Few<const TensorImpl*> all;
        for (const at::Tensor* each : tensors) all.push_back(each->unsafeGetTensorImpl());
        const auto stored = all.begin() + 1 + packed, extras = stored + has_weight + has_bias;
        const TensorImpl* added = has_bias ? all[1 + packed + has_weight] : nullptr;
        return {*all[0], Few<const TensorImpl*>(all.begin() + 1, stored), added,
                Few<const TensorImpl*>(extras, all.end()), out->sizes().back()};
    }
};

// Whether all arguments are plain: tensors of the CPU in strided memory, and none a subclass.
static bool take(Given& given, PyObject* const* arguments, Py_ssize_t count) {
    const auto add = [&](PyObject* object) {
        if (!THPVariable_CheckExact(object)) return false;
        given.tensors.push_back(&THPVariable_Unpack(object));
        return given.tensors.back()->is_cpu() && given.tensors.back()->layout() == at::kStrided;
    };
    for (Py_ssize_t at = 0; at < count - 4; ++at)
        if (!add(arguments[at])) return false;
    given.text = arguments[count - 4];
    given.packed = PyLong_AsSize_t(arguments[count - 3]);
    given.has_weight = arguments[count - 2] == Py_True;
    given.has_bias = arguments[count - 1] == Py_True;
    if (!add(arguments[count])) return false;  // the only keyword
    given.out = given.tensors.back();
    given.tensors.pop_back();
    return given.out->dim() && given.tensors.size() >= 1 + given.packed + given.has_weight + given.has_bias;
}

// What a constant of generated code names, by its address: it is kept, so that no other gets that.
template <typename Thing>
class Texts {
    std::unordered_map<PyObject*, const Thing*> found;
    std::shared_mutex mutex;

  public:
    template <typename Find>
    const Thing* operator()(PyObject* text, Find find) {
        {
            const std::shared_lock lock(mutex);
            if (const auto place = found.find(text); place != found.end()) return place->second;
        }
        Py_ssize_t size = 0;
        const char* letters = PyUnicode_AsUTF8AndSize(text, &size);
        if (!letters) throw python_error();
        const Thing* thing = find(std::string(letters, size));
        const std::unique_lock lock(mutex);
        if (thing && found.emplace(text, thing).second) Py_INCREF(text);
        return thing;
    }
};

static bool run(const Given& given, const Call& call, const Kernel* kernel) {
    if (!kernel || !lies(*given.out->unsafeGetTensorImpl(), given.x().scalar_type(), call.sizes()))
        return false;
    const pybind11::gil_scoped_release others_may_run;
    return !given.out->numel() || kernel->run(call, given.out->mutable_data_ptr(), call.rows());
}

static at::Tensor square(const at::Tensor& tensor, int64_t columns) {
    const int64_t rows = columns ? tensor.numel() / columns : 0;
    return tensor.dim() == 2 ? tensor : at::cpu::as_strided(tensor, {rows, columns}, {columns, 1});
}

// x W^T + bias, as Inductor calls it for a dense layer.
static bool dense(const Given& given, const Call& call, bool is_transposed) {
    const at::Tensor* weight = given.weight();
    const auto type = given.x().scalar_type();
    const int64_t in = call.in(), out = call.features;
    const Few<int64_t> sizes = is_transposed ? Few<int64_t>{in, out} : Few<int64_t>{out, in};
    if (!weight || !lies(*weight->unsafeGetTensorImpl(), type, sizes)) return false;
    if (!lies(call.x, type) || !lies(*given.out->unsafeGetTensorImpl(), type, call.sizes())) return false;
    if (call.bias && !lies(*call.bias, type, {out})) return false;
    const pybind11::gil_scoped_release others_may_run;
    const at::Tensor right = is_transposed ? *weight : at::cpu::as_strided(*weight, {in, out}, {1, in});
    at::Tensor result = square(*given.out, out);
    if (given.bias()) at::cpu::addmm_out(result, *given.bias(), square(given.x(), in), right);
    else at::cpu::mm_out(result, square(given.x(), in), right);
    return true;
}

static bool linear(const Given& given) {
    static auto& handles = *new Texts<Kernel>;
    const Call call = given.call();
    const Kernel* kernel = handles(given.text, [](const std::string& text) { return kernels().find(text); });
    return kernel && kernel->takes(call) && run(given, call, kernel);
}

static bool by_rows(const Given& given) {
    static auto& texts = *new Texts<Routes>;
    Call call = given.call();
    const Routes& routes = *texts(given.text, [](const std::string& text) { return &routes_of(text); });
    const Choice made = choice(call, routes);
    return made.is_dense ? dense(given, call, routes.transposed) : run(given, call, made.kernel);
}

// Python's function for what is unusual, with the same arguments.
template <bool (*compute)(const Given&)>
static PyObject* others = nullptr;

template <bool (*compute)(const Given&)>
static PyObject* builtin(PyObject*, PyObject* const* arguments, Py_ssize_t count, PyObject* keywords) {
    HANDLE_TH_ERRORS
    Given given;
    const bool fits = count >= 5 && keywords && PyTuple_GET_SIZE(keywords) == 1;
    if (fits && take(given, arguments, count) && compute(given)) Py_RETURN_NONE;
    if (PyErr_Occurred()) return nullptr;
    return PyObject_Vectorcall(others<compute>, arguments, count, keywords);
    END_HANDLE_TH_ERRORS
}

template <bool (*compute)(const Given&)>
static PyObject* function(const char* name, PyObject* in_python) {
    static PyMethodDef method = {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&builtin<compute>)),
                                 METH_FASTCALL | METH_KEYWORDS, nullptr};
    Py_INCREF(in_python);
    others<compute> = in_python;
    return PyCFunction_New(&method, nullptr);
}

}  // namespace direct

// The two builtins; each is given its function in Python.
extern "C" PyObject* sparsefx_direct_linear(PyObject* in_python) {
    return direct::function<direct::linear>("linear", in_python);
}

extern "C" PyObject* sparsefx_direct_by_rows(PyObject* in_python) {
    return direct::function<direct::by_rows>("by_rows", in_python);
}
