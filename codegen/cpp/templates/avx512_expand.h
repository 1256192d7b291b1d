// AVX-512, any keep bits, on processors whose vexpandps takes 2 cycles, from memory too.
#include "avx512_columns.h"

static inline Lanes expand(Key keep, Values values) {
    return _mm512_maskz_expand_ps(keep, load<N ? WIDTH * N / M : WIDTH>(values));
}
