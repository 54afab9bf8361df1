// Matrices of weights, and what they make of the rows of a pass.

#pragma once

#include "amx.h"
#include "vectors.h"

#include <cmath>

extern "C" {

enum Kind : int32_t { FLOAT, BFLOAT, BYTES, TERNARY, BFLOAT_TILES };

struct Matrix {
    const void* data;     // (rows, width), in `kind`
    const float* scales;  // BYTES: (rows,); TERNARY: one
    int32_t rows, width;
    int32_t kind;
};

}  // extern "C"

namespace {

// Whole numbers. Inputs are rounded by token: beside 8-bit weights to as many levels as their sum
// has room for in 32 bits, and to 8 bits beside ternary ones (BitNet b1.58).

#if defined(__AVX2__)
// The sums of four vectors of eight whole numbers.
inline void sums_of(const __m256i* v, int32_t* out) {
    const __m256i both = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]),
                                           _mm256_hadd_epi32(v[2], v[3]));
    _mm_storeu_si128((__m128i*)out, _mm_add_epi32(_mm256_castsi256_si128(both),
                                                  _mm256_extracti128_si256(both, 1)));
}
#endif

// Four weights to a byte, the first in its lowest bits, each the weight plus one. The inputs are
// laid out to match: of each block of 128 those at 0, 4, 8 ... first, then those at 1, 5, 9 ...
constexpr int TERNARY_BLOCK = 128;

void ternary_dots(const uint8_t* w, const int8_t* x, int width, int32_t* out) {
    const int64_t stride = (width + 3) / 4;
    int k = 0;
    for (int r = 0; r < 4; ++r) out[r] = 0;
#if defined(__AVX2__)
    const __m256i low = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
    __m256i sums[4] = {};
    for (; k + TERNARY_BLOCK <= width; k += TERNARY_BLOCK) {
        const auto* inputs = (const __m256i*)(x + k);
        for (int r = 0; r < 4; ++r) {
            const __m256i codes = _mm256_loadu_si256((const __m256i*)(w + r * stride + k / 4));
            auto part = [&](int number, __m256i shifted) {
                return _mm256_maddubs_epi16(_mm256_and_si256(shifted, low),
                                            _mm256_loadu_si256(inputs + number));
            };
            const __m256i pairs = _mm256_add_epi16(
                _mm256_add_epi16(part(0, codes), part(1, _mm256_srli_epi16(codes, 2))),
                _mm256_add_epi16(part(2, _mm256_srli_epi16(codes, 4)),
                                 part(3, _mm256_srli_epi16(codes, 6))));
            sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(pairs, ones));
        }
    }
    sums_of(sums, out);
#endif
    for (; k < width; ++k) {
        const int block = k / TERNARY_BLOCK * TERNARY_BLOCK, in = k - block;
        const int quarter = std::min(TERNARY_BLOCK, (width - block + 3) / 4 * 4) / 4;
        const int32_t input = x[block + in % 4 * quarter + in / 4];
        for (int r = 0; r < 4; ++r)
            out[r] += (int32_t)((w[r * stride + k / 4] >> (2 * (k % 4))) & 3) * input;
    }
}

// What a layer reads, in the number type that its weights ask for.
struct Input {
    const float* floats = nullptr;
    int count = 0, width = 0, kind = FLOAT;
    Buffer<int16_t> shorts;
    Buffer<int8_t> bytes;
    std::vector<float> scales;
    std::vector<int32_t> sums;
    TileInputs tiles;

    void make_room(int count_, int width_, int kind_) {
        count = count_, width = width_, kind = kind_;
        scales.resize(count), sums.resize(count);
        if (kind == BYTES) shorts.resize((size_t)count * width);
        if (kind == TERNARY) bytes.resize((size_t)count * (width + 3));
        if (kind == BFLOAT_TILES) tiles.make_room(count, width);
    }

    // Row n from x, where the weights are whole numbers or tiles.
    void round(int n, const float* x) {
        if (kind == BFLOAT_TILES) tiles.take(n, x);
        if (kind != BYTES && kind != TERNARY) return;
        const float room = (float)INT32_MAX / 127 / width - 1;
        const float levels = kind == BYTES ? std::min(32767.0f, room) : 127;
        float largest = 1e-5f;
        for (int k = 0; k < width; ++k) largest = std::max(largest, std::fabs(x[k]));
        const float scale = largest / levels;
        scales[n] = scale;
        if (kind == BYTES) {
            int16_t* out = shorts.data() + (int64_t)n * width;
            for (int k = 0; k < width; ++k) out[k] = (int16_t)(int32_t)std::nearbyint(x[k] / scale);
            return;
        }
        thread_local std::vector<int8_t> plain;
        plain.assign((width + 3) / 4 * 4, 0);
        int32_t total = 0;
        for (int k = 0; k < width; ++k) {
            const int32_t value = (int32_t)std::nearbyint(x[k] / scale);
            plain[k] = (int8_t)value, total += value;
        }
        sums[n] = total;
        int8_t* out = bytes.data() + (int64_t)n * (width + 3);
        for (int block = 0; block < width; block += TERNARY_BLOCK) {
            const int quarter = std::min(TERNARY_BLOCK, (width - block + 3) / 4 * 4) / 4;
            for (int part = 0; part < 4; ++part)
                for (int i = 0; i < quarter; ++i)
                    out[block + part * quarter + i] = plain[block + 4 * i + part];
        }
    }
};

// The sums of whole numbers at `at`, in place: times the scales of their weights and of their input.
// Not inlined: a compiler that may reorder products would do so by the number of inputs.
[[gnu::noinline]] void scale_sums(float* at, float input, const float* scales, int count) {
    for (int i = 0; i < count; ++i) {
        int32_t sum;
        memcpy(&sum, at + i, sizeof(sum));
        at[i] = sum * (input * scales[i]);
    }
}

// Rows are stored in fours, the last of them filled up, so that no sum reads beyond.
void ternary_row(const Matrix& m, int r, int some, const Input& in, int n, float* out) {
    const int width = in.width;
    int32_t sums[4];
    ternary_dots((const uint8_t*)m.data + (int64_t)r * ((width + 3) / 4),
                 in.bytes.data() + (int64_t)n * (width + 3), width, sums);
    for (int i = 0; i < some; ++i)
        out[i] = (sums[i] - in.sums[n]) * (in.scales[n] * m.scales[0]);
}

// Rows that a product takes together.
inline int unit_of(const Matrix& m) { return m.kind == BFLOAT_TILES ? TILE_ROWS : 4; }

// out[n][r] for some rows of a matrix and all inputs.
void product(const Matrix& m, int begin, int end, const Input& in, float* out, int64_t stride) {
    const int width = in.width, count = in.count;
    switch (m.kind) {
        case FLOAT:
            return multiply((const float*)m.data, begin, end, in.floats, width, count, out, stride);
        case BFLOAT:
            return multiply((const uint16_t*)m.data, begin, end, in.floats, width, count, out,
                            stride);
        case BFLOAT_TILES:
            return multiply_tiles((const uint16_t*)m.data, begin, end, in.tiles, out, stride);
        case BYTES:
            multiply((const int8_t*)m.data, begin, end, in.shorts.data(), width, count,
                     (int32_t*)out, stride);
            for (int n = 0; n < count; ++n)
                scale_sums(out + n * stride + begin, in.scales[n], m.scales + begin, end - begin);
            return;
        default:
            for (int r = begin; r < end; r += 4)
                for (int n = 0; n < count; ++n)
                    ternary_row(m, r, std::min(4, end - r), in, n, out + n * stride + r);
    }
}

}  // namespace
