// What the operators ask of onnxruntime, with its failures as exceptions.

struct Failure {
    OrtStatus* status;
};

static void must(OrtStatus* status) {
    if (status) throw Failure{status};
}

struct Tensor {
    const void* data = nullptr;
    std::vector<int64_t> dims;
    int64_t rows() const {  // of its last axis
        int64_t product = 1;
        for (size_t i = 0; i + 1 < dims.size(); ++i) product *= dims[i];
        return product;
    }
};

static void* data_of(const OrtApi& api, const OrtValue* value) {
    void* data = nullptr;
    must(api.GetTensorMutableData(const_cast<OrtValue*>(value), &data));
    return data;
}

static Tensor tensor_of(const OrtApi& api, const OrtValue* value) {
    OrtTensorTypeAndShapeInfo* info = nullptr;
    must(api.GetTensorTypeAndShape(value, &info));
    Tensor tensor;
    size_t rank = 0;
    OrtStatus* failed = api.GetDimensionsCount(info, &rank);
    tensor.dims.resize(rank);
    if (!failed) failed = api.GetDimensions(info, tensor.dims.data(), rank);
    api.ReleaseTensorTypeAndShapeInfo(info);
    must(failed);
    tensor.data = data_of(api, value);
    return tensor;
}

static Tensor input_of(const OrtApi& api, const OrtKernelContext* context, size_t place) {
    const OrtValue* value = nullptr;
    must(api.KernelContext_GetInput(context, place, &value));
    if (!value) throw Failure{api.CreateStatus(INVALID_ARGUMENT, "an input of it is left out")};
    return tensor_of(api, value);
}

static std::string text_of(const OrtApi& api, const OrtKernelInfo* info, const char* attribute) {
    size_t size = 0;
    must(api.KernelInfoGetAttribute_string(info, attribute, nullptr, &size));
    std::string text(size, '\0');
    must(api.KernelInfoGetAttribute_string(info, attribute, text.data(), &size));
    return text.c_str();  // without the terminating zero
}

static std::string name_of(const OrtApi& api, const OrtKernelInfo* info) {
    size_t size = 0;
    must(api.KernelInfo_GetNodeName(info, nullptr, &size));
    std::string text(size, '\0');
    must(api.KernelInfo_GetNodeName(info, text.data(), &size));
    return text.c_str();
}

static std::string text_of(const std::vector<int64_t>& dims) {
    std::string text;
    for (int64_t dim : dims) text += (text.empty() ? "[" : ", ") + std::to_string(dim);
    return text.empty() ? "[]" : text + "]";
}
