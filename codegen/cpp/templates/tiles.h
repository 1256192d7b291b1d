// AMX: registers of 16 rows of 64 bytes, and products of two of them.
#include <sys/syscall.h>
#include <unistd.h>

constexpr int TILE_ROWS = 16, TILE_LINE = 64, TILE = TILE_ROWS * TILE_LINE;  // bytes of a line, all

// What ldtilecfg reads.
struct TileShapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t line[16] = {};
    uint8_t rows[16] = {};
};

// Linux lets a process use tiles once it has asked for them, and may refuse.
static bool asked_for_tiles() {
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
}
static const bool MAY_USE_TILES = asked_for_tiles();

static inline void begin_tiles(const TileShapes& shapes) {
    asm volatile("ldtilecfg %0" ::"m"(shapes));
}
static inline void end_tiles() { asm volatile("tilerelease"); }

// The intrinsics of g++ do not say that they read or write memory.
template <int OF>
static inline void tile_load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(OF) : "memory");
}
template <int OF>
static inline void tile_store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(OF) : "memory");
}
template <int OF>
static inline void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(OF));
}
