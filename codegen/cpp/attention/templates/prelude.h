#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#include <vector>

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };
