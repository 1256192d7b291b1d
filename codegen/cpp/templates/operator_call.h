// A call of a packed linear: its tensors, and which of them a C function may read as they are.
using c10::IValue;
using c10::ScalarType;
using c10::TensorImpl;

template <typename Item>
using Few = c10::SmallVector<Item, 4>;

// Whether a tensor is of `type` and lies row by row, whole in its memory.
static bool lies(const TensorImpl& tensor, ScalarType type) {
    if (tensor.dtype() != c10::scalarTypeToTypeMeta(type) || !tensor.is_contiguous()) return false;
    const auto items = static_cast<size_t>(tensor.storage_offset() + tensor.numel());
    return !tensor.numel() || items * tensor.itemsize() <= tensor.storage().nbytes();
}

static bool lies(const TensorImpl& tensor, ScalarType type, c10::IntArrayRef sizes) {
    return tensor.sizes() == sizes && lies(tensor, type);
}

struct Call {
    const TensorImpl& x;
    Few<const TensorImpl*> packed;
    const TensorImpl* bias;  // or nullptr
    Few<const TensorImpl*> extras;
    int64_t features;

    int64_t in() const { return x.sizes().back(); }

    int64_t rows() const { return c10::numelements_to_dim(x.dim() - 1, x.sizes()); }

    // Of the result.
    Few<int64_t> sizes() const {
        Few<int64_t> found(x.sizes().begin(), x.sizes().end());
        found.back() = features;
        return found;
    }

    // Whether all tensors but the packed ones are as a kernel of this type reads them.
    bool fits(ScalarType type, int64_t out, bool has_bias, size_t count) const {
        if (!x.dim() || !lies(x, type)) return false;
        if ((bias != nullptr) != has_bias || extras.size() != count) return false;
        if (bias && !lies(*bias, type, {out})) return false;
        const auto whole = sizes();
        return std::all_of(extras.begin(), extras.end(),
                           [&](const TensorImpl* each) { return lies(*each, type, whole); });
    }
};
