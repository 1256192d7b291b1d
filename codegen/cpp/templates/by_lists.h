// How to multiply by any number of rows of x: few as above, more by lists of what W keeps.
#include "kept.h"
constexpr bool PAIRS = false;  // columns of x are staged one by one
#include "cut.h"
#include "lists.h"
#include "many_rows.h"
#ifdef __AVX512VBMI2__
#include "eight_rows.h"
#endif

// The fastest way to multiply by `batch` rows of x.
static decltype(&few_rows) way(const Shape& shape, int64_t batch) {
#ifdef __AVX512VBMI2__
    if (eight_rows_pay(shape, batch)) return eight_rows;
#endif
    return many_rows_pay(shape, batch) ? many_rows : few_rows;
}
