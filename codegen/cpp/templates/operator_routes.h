// Which kernel runs at which number of rows: what the text of by_rows.Routes says.

struct Pick {
    bool is_ours;  // an operator of other targets is Python's
    std::string handle;
    std::vector<int64_t> tensors;
    int64_t multiple;
};

struct Range {
    int64_t first;
    std::vector<Pick> picks;
};

struct Routes {
    std::vector<Range> ranges;  // none if the text was not understood
    bool transposed, is_unpacked;

    const Range& at(int64_t rows) const {
        size_t place = ranges.size() - 1;
        while (place && ranges[place].first > rows) --place;
        return ranges[place];
    }
};

// Reads what Routes writes, word for word. A text that is otherwise is left to Python.
class Reader {
    std::string_view rest;
    bool understood = true;

    bool take(std::string_view text) {
        const bool is_next = understood && rest.substr(0, text.size()) == text;
        if (is_next) rest.remove_prefix(text.size());
        return is_next;
    }

    void need(std::string_view text) { understood = take(text); }

    std::string until(char end) {
        const size_t length = std::min(rest.find(end), rest.size());
        const std::string found(rest.substr(0, length));
        rest.remove_prefix(length);
        return found;
    }

    int64_t number() {
        int64_t found = 0;
        const auto [end, error] = std::from_chars(rest.begin(), rest.end(), found);
        understood = understood && error == std::errc();
        rest.remove_prefix(end - rest.begin());
        return found;
    }

    template <typename Item>
    std::vector<Item> list(Item (Reader::*item)()) {
        std::vector<Item> found;
        need("[");
        if (take("]")) return found;
        do found.push_back((this->*item)());
        while (take(","));
        need("]");
        return found;
    }

    Pick pick() {
        Pick found;
        need("{\"op\":\"");
        found.is_ours = until('"') == "sparsefx_cpp::linear";
        need("\",\"handle\":\"");
        found.handle = until('"');
        need("\",\"tensors\":");
        found.tensors = list(&Reader::number);
        need(",\"multiple\":");
        found.multiple = number();
        need("}");
        understood = understood && found.multiple > 0;
        return found;
    }

    Range range() {
        Range found;
        need("{\"first\":");
        found.first = number();
        need(",\"picks\":");
        found.picks = list(&Reader::pick);
        need("}");
        return found;
    }

  public:
    explicit Reader(std::string_view text) : rest(text) {}

    // The rest of the text says how and from which tensors a dense weight is unpacked.
    std::unique_ptr<const Routes> routes() {
        auto found = std::make_unique<Routes>();
        need("{\"routes\":");
        found->ranges = list(&Reader::range);
        need(",\"dense\":{\"transposed\":");
        found->transposed = take("true");
        if (!found->transposed) need("false");
        need(",\"packing\":");
        found->is_unpacked = !take("null");
        if (!understood) found->ranges.clear();
        return found;
    }
};
