// What every kernel needs.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };
struct int4 { uint8_t pair; };

constexpr int64_t SMALL = 32768;  // multiply-adds below which threads cost more than they help
