// Products of bfloat16 weights by matrix tiles (AMX): up to 16 inputs by 16 rows at once.
//
// Tiles multiply bfloat16 and add up in float32. An input's 24 bits are three bfloat16 of eight
// each, so that nothing of it is lost unless a part is subnormal, which tiles take as zero. Each sum
// is taken by itself and in the same order, so its bits do not depend on the other inputs.

#pragma once

#include "vectors.h"

#if defined(__AMX_BF16__) && defined(__AVX512BW__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define LOOPTX_AMX 1
#endif

namespace {

// A tile has 16 rows of 16 pairs of numbers. Of weights each row has the pairs of 16 rows of the
// matrix, numbers k and k + 16 of a step of 32 along them. Two such tiles, of 32 rows, are stored
// one behind the other for each step; bindings.py packs them so.
constexpr int SIDE = 16, DEEP = 32, TILE = SIDE * DEEP, TILE_ROWS = 2 * SIDE;

#if defined(LOOPTX_AMX)

// Whether this process may use tiles: the system has to make room for them in each thread.
inline bool has_tiles() {
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool granted = !syscall(SYS_arch_prctl, REQUEST, TILE_DATA);
    return granted;
}

// The tiles of this thread, for as long as this lives. The time of a product grows with `inputs`.
struct Tiles {
    explicit Tiles(int inputs) {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, none[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } own;
        for (int i = 0; i < 8; ++i) own.bytes[i] = 64, own.rows[i] = i == WEIGHTS ? SIDE : inputs;
        asm volatile("" ::"r"(&own) : "memory");  // GCC's intrinsic says that it reads 8 bytes alone
        _tile_loadconfig(&own);
    }
    ~Tiles() { _tile_release(); }
    static constexpr int WEIGHTS = 4;
};

// Compilers do not know that tiles read and write memory.
inline void memory_moves() { asm volatile("" ::: "memory"); }

// The inputs of a product: for every 16 of them and every step the three parts, a tile each.
struct TileInputs {
    static constexpr int PARTS = 3;
    Buffer<uint16_t> parts;
    int count = 0, width = 0;

    int steps() const { return (width + DEEP - 1) / DEEP; }
    int64_t at(int group, int step) const {
        return ((int64_t)group * steps() + step) * PARTS * TILE;
    }

    void make_room(int count_, int width_) {
        count = count_, width = width_;
        parts.resize((size_t)at((count + SIDE - 1) / SIDE, 0));
    }

    // Input n from x.
    void take(int n, const float* x) {
        const __m512i upper = _mm512_set1_epi32(0xffff0000);
        const __m512i upper_first =
            _mm512_set4_epi32(0x0f0e0f0e, 0x0b0a0b0a, 0x07060706, 0x03020302);
        for (int step = 0; step < steps(); ++step) {
            const int left = width - step * DEEP;
            const auto mask = left >= DEEP ? ~0u : (1u << left) - 1;
            __m512 low = _mm512_maskz_loadu_ps((__mmask16)mask, x + step * DEEP);
            __m512 high = _mm512_maskz_loadu_ps((__mmask16)(mask >> SIDE), x + step * DEEP + SIDE);
            uint16_t* out = parts.data() + at(n / SIDE, step) + n % SIDE * DEEP;
            for (int part = 0; part < PARTS; ++part) {
                const __m512i pairs = _mm512_mask_shuffle_epi8((__m512i)high, 0x3333333333333333,
                                                               (__m512i)low, upper_first);
                _mm512_store_si512(out + part * TILE, pairs);
                low = _mm512_sub_ps(low, (__m512)_mm512_and_si512((__m512i)low, upper));
                high = _mm512_sub_ps(high, (__m512)_mm512_and_si512((__m512i)high, upper));
            }
        }
    }
};

// The sums of inputs, from their first tile on, by 32 rows: into tiles 0 and 1.
inline void add_tiles(const uint16_t* weights, const uint16_t* inputs, int steps) {
    _tile_zero(0);
    _tile_zero(1);
    for (int step = 0; step < steps; ++step, weights += 2 * TILE, inputs += 3 * TILE) {
#pragma GCC unroll 32
        for (int line = 0; line < 2 * SIDE; ++line)
            __builtin_prefetch((const char*)weights + AHEAD / 2 + line * LINE, 0, 2);
        _tile_loadd(5, inputs, 64);
        _tile_loadd(6, inputs + TILE, 64);
        _tile_loadd(7, inputs + 2 * TILE, 64);
        _tile_loadd(4, weights, 64);
        _tile_dpbf16ps(0, 5, 4);
        _tile_dpbf16ps(0, 6, 4);
        _tile_dpbf16ps(0, 7, 4);
        _tile_loadd(4, weights + TILE, 64);
        _tile_dpbf16ps(1, 5, 4);
        _tile_dpbf16ps(1, 6, 4);
        _tile_dpbf16ps(1, 7, 4);
    }
}

// `multiply` of packed weights.
inline void multiply_tiles(const uint16_t* w, int begin, int end, const TileInputs& in, float* out,
                           int64_t stride) {
    const int steps = in.steps();
    for (int n = 0; n < in.count; n += SIDE) {
        const int many = std::min(SIDE, in.count - n);
        const Tiles tiles(many);
        for (int first = begin / TILE_ROWS * TILE_ROWS; first < end; first += TILE_ROWS) {
            add_tiles(w + (int64_t)first * steps * DEEP, in.parts.data() + in.at(n / SIDE, 0), steps);
            if (begin <= first && first + TILE_ROWS <= end) {
                _tile_stored(0, out + n * stride + first, stride * sizeof(float));
                _tile_stored(1, out + n * stride + first + SIDE, stride * sizeof(float));
                memory_moves();
                continue;
            }
            alignas(64) float sums[SIDE * TILE_ROWS];
            _tile_stored(0, sums, TILE_ROWS * sizeof(float));
            _tile_stored(1, sums + SIDE, TILE_ROWS * sizeof(float));
            memory_moves();
            for (int i = 0; i < many; ++i)
                for (int r = std::max(begin, first); r < std::min(end, first + TILE_ROWS); ++r)
                    out[(n + i) * stride + r] = sums[i * TILE_ROWS + r - first];
        }
    }
}

#else

inline bool has_tiles() { return false; }

struct TileInputs {
    void make_room(int, int) {}
    void take(int, const float*) {}
};

inline void multiply_tiles(const uint16_t*, int, int, const TileInputs&, float*, int64_t) {}

#endif

}  // namespace
