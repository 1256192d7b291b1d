// order[keep][column]: which of the values at hand goes to the column, or -1 where its bit is 0.
struct Orders {
    int8_t order[256][8];
    constexpr Orders() : order() {
        for (int keep = 0; keep < 256; ++keep)
            for (int column = 0, value = 0; column < 8; ++column)
                order[keep][column] = keep >> column & 1 ? value++ : -1;
    }
};
static constexpr Orders ORDERS;
