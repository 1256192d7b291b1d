// The part of onnxruntime's C interface that the operators need. Its table of functions only ever
// grows at the end, so a place means the same in every version that has it; ours names the places
// that we call and leaves the rest blank. All of it is there from version 17 (onnxruntime 1.17) on.
struct OrtStatus;  // null: all is well
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtCustomOp;

constexpr uint32_t API_VERSION = 17;
enum ErrorCode { FAIL = 1, INVALID_ARGUMENT = 2 };
enum ElementType { FLOAT = 1, UINT8 = 2, FLOAT16 = 10 };
enum Characteristic { REQUIRED = 0, VARIADIC = 2 };

struct OrtApi {
    OrtStatus* (*CreateStatus)(ErrorCode, const char* message);
    void* blank_1[25];
    OrtStatus* (*CreateCustomOpDomain)(const char* name, OrtCustomOpDomain**);
    OrtStatus* (*CustomOpDomain_Add)(OrtCustomOpDomain*, const OrtCustomOp*);
    OrtStatus* (*AddCustomOpDomain)(OrtSessionOptions*, OrtCustomOpDomain*);
    void* blank_29[22];
    OrtStatus* (*GetTensorMutableData)(OrtValue*, void**);
    void* blank_52[9];
    OrtStatus* (*GetDimensionsCount)(const OrtTensorTypeAndShapeInfo*, size_t*);
    OrtStatus* (*GetDimensions)(const OrtTensorTypeAndShapeInfo*, int64_t*, size_t);
    void* blank_63[2];
    OrtStatus* (*GetTensorTypeAndShape)(const OrtValue*, OrtTensorTypeAndShapeInfo**);
    void* blank_66[20];
    OrtStatus* (*KernelInfoGetAttribute_int64)(const OrtKernelInfo*, const char* name, int64_t*);
    OrtStatus* (*KernelInfoGetAttribute_string)(const OrtKernelInfo*, const char* name, char*,
                                                size_t*);
    void* blank_88[2];
    OrtStatus* (*KernelContext_GetInput)(const OrtKernelContext*, size_t, const OrtValue**);
    OrtStatus* (*KernelContext_GetOutput)(OrtKernelContext*, size_t, const int64_t* dims,
                                          size_t rank, OrtValue**);
    void* blank_92[7];
    void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo*);
    void* blank_100[63];
    OrtStatus* (*KernelInfoGetAttributeArray_int64)(const OrtKernelInfo*, const char* name,
                                                    int64_t*, size_t*);
    void* blank_164[66];
    OrtStatus* (*KernelInfo_GetInputCount)(const OrtKernelInfo*, size_t*);
    void* blank_231[13];
    OrtStatus* (*KernelInfo_GetNodeName)(const OrtKernelInfo*, char*, size_t*);
    void* blank_245[4];
    OrtStatus* (*KernelInfoGetConstantInput_tensor)(const OrtKernelInfo*, size_t, int* is_constant,
                                                    const OrtValue**);
    void* blank_250[24];
    OrtStatus* (*KernelContext_ParallelFor)(const OrtKernelContext*, void (*)(void*, size_t),
                                            size_t total, size_t batches, void* data);
};
static_assert(offsetof(OrtApi, KernelContext_GetInput) == 90 * sizeof(void*));
static_assert(offsetof(OrtApi, KernelInfoGetAttributeArray_int64) == 163 * sizeof(void*));
static_assert(offsetof(OrtApi, KernelInfoGetConstantInput_tensor) == 249 * sizeof(void*));
static_assert(offsetof(OrtApi, KernelContext_ParallelFor) == 274 * sizeof(void*));

struct OrtApiBase {
    const OrtApi* (*GetApi)(uint32_t version);  // null where that version is not there
    const char* (*GetVersionString)();
};

// An operator, as version 17 of the interface reads it; null functions are not called.
struct OrtCustomOp {
    uint32_t version;
    void* blank_create;  // CreateKernelV2 and KernelComputeV2 stand in: they can fail
    const char* (*GetName)(const OrtCustomOp*);
    const char* (*GetExecutionProviderType)(const OrtCustomOp*);
    ElementType (*GetInputType)(const OrtCustomOp*, size_t);
    size_t (*GetInputTypeCount)(const OrtCustomOp*);
    ElementType (*GetOutputType)(const OrtCustomOp*, size_t);
    size_t (*GetOutputTypeCount)(const OrtCustomOp*);
    void* blank_compute;
    void (*KernelDestroy)(void*);
    Characteristic (*GetInputCharacteristic)(const OrtCustomOp*, size_t);
    Characteristic (*GetOutputCharacteristic)(const OrtCustomOp*, size_t);
    int (*GetInputMemoryType)(const OrtCustomOp*, size_t);
    int (*GetVariadicInputMinArity)(const OrtCustomOp*);
    int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
    int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
    int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
    OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void**);
    OrtStatus* (*KernelComputeV2)(void*, OrtKernelContext*);
    void* blank_infer_shape;
    int (*GetStartVersion)(const OrtCustomOp*);
    int (*GetEndVersion)(const OrtCustomOp*);
    void* blank_later[4];
};
