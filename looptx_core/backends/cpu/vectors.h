// Vectors, and the sums of products along them.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

// Memory that begins at a cache line: a vector that lies across two lines takes two reads.
template <class T> struct LineAllocator {
    typedef T value_type;
    static constexpr std::align_val_t LINE{64};

    LineAllocator() = default;
    template <class Other> LineAllocator(const LineAllocator<Other>&) {}
    T* allocate(size_t count) { return (T*)::operator new(count * sizeof(T), LINE); }
    void deallocate(T* at, size_t) { ::operator delete(at, LINE); }
    bool operator==(const LineAllocator&) const { return true; }
    bool operator!=(const LineAllocator&) const { return false; }
};
template <class T> using Buffer = std::vector<T, LineAllocator<T>>;

#if defined(__AVX512BW__)
constexpr int LANES = 16, SHORTS = 32;
#elif defined(__AVX2__)
constexpr int LANES = 8, SHORTS = 16;
#else
constexpr int LANES = 8, SHORTS = 8;
#endif
typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef int16_t Shorts __attribute__((vector_size(2 * SHORTS), aligned(2), may_alias));

inline Floats load(const float* at) { return *reinterpret_cast<const Floats*>(at); }

inline Floats load(const uint16_t* at) {  // bfloat16
#if defined(__AVX512BW__)
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)at));
    return (Floats)_mm512_slli_epi32(wide, 16);
#elif defined(__AVX2__)
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)at));
    return (Floats)_mm256_slli_epi32(wide, 16);
#else
    typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
    typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
    return (Floats)(__builtin_convertvector(*reinterpret_cast<const Halves*>(at), Words) << 16);
#endif
}

inline Shorts load(const int16_t* at) { return *reinterpret_cast<const Shorts*>(at); }

inline Shorts load(const int8_t* at) {
#if defined(__AVX512BW__)
    return (Shorts)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)at));
#elif defined(__AVX2__)
    return (Shorts)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)at));
#else
    typedef int8_t Bytes __attribute__((vector_size(SHORTS), aligned(1), may_alias));
    return __builtin_convertvector(*reinterpret_cast<const Bytes*>(at), Shorts);
#endif
}

Floats sums_for(Floats);
Ints sums_for(Shorts);

inline Floats add_products(Floats sums, Floats a, Floats b) { return sums + a * b; }

// On x86 each sum is of two products.
inline Ints add_products(Ints sums, Shorts a, Shorts b) {
#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
    return (Ints)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
    return sums + (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVXVNNI__)
    return (Ints)_mm256_dpwssd_avx_epi32((__m256i)sums, (__m256i)a, (__m256i)b);
#elif defined(__AVX2__)
    return sums + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    return sums + __builtin_convertvector(a, Ints) * __builtin_convertvector(b, Ints);
#endif
}

// Keep a vector in its register: compilers would read it again for each product that it enters.
template <class Vector> inline void hold(Vector& v) {
#if defined(__AVX2__)
    asm("" : "+v"(v));
#else
    (void)v;
#endif
}

inline float sum(Floats v) {
    float total = 0;
    for (int i = 0; i < LANES; ++i) total += v[i];
    return total;
}

// Four vectors' sums by N inputs: out[n][r] is that of sums[n][r]. All are added up in the same
// order.
#if defined(__AVX512BW__)
// Of each quarter of four vectors the four sums.
template <class Vector> inline Vector sums_by_quarter(const Vector* v) {
    const auto pairs = [](Vector a, Vector b) {
        return (Vector)_mm512_unpacklo_ps((__m512)a, (__m512)b) +
               (Vector)_mm512_unpackhi_ps((__m512)a, (__m512)b);
    };
    const auto a = (__m512d)pairs(v[0], v[1]), b = (__m512d)pairs(v[2], v[3]);
    return (Vector)_mm512_unpacklo_pd(a, b) + (Vector)_mm512_unpackhi_pd(a, b);
}

// Neighbouring quarters of a, and then of b, added up.
template <class Vector> inline Vector halve(Vector a, Vector b) {
    return (Vector)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x88) +
           (Vector)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xdd);
}

template <int N, class Vector, class Number>
inline void add_up(const Vector (*sums)[4], Number (*out)[4]) {
    Vector by_quarter[4] = {};
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) by_quarter[n] = sums_by_quarter(sums[n]);
    const Vector all = halve(halve(by_quarter[0], by_quarter[1]),
                             halve(by_quarter[2], by_quarter[3]));
    memcpy(out, &all, N * sizeof(*out));
}
#elif defined(__AVX2__)
inline __m256i add_pairs(__m256i a, __m256i b) { return _mm256_hadd_epi32(a, b); }
inline __m256 add_pairs(__m256 a, __m256 b) { return _mm256_hadd_ps(a, b); }

template <int N, class Vector, class Number>
inline void add_up(const Vector (*sums)[4], Number (*out)[4]) {
    typedef Number Four __attribute__((vector_size(16)));
    typedef std::conditional_t<std::is_same_v<Number, float>, __m256, __m256i> Plain;
    for (int n = 0; n < N; ++n) {
        const auto all = (__m256)add_pairs(add_pairs((Plain)sums[n][0], (Plain)sums[n][1]),
                                           add_pairs((Plain)sums[n][2], (Plain)sums[n][3]));
        const Four four = (Four)_mm256_castps256_ps128(all) + (Four)_mm256_extractf128_ps(all, 1);
        memcpy(out[n], &four, sizeof(four));
    }
}
#else
template <int N, class Vector, class Number>
inline void add_up(const Vector (*sums)[4], Number (*out)[4]) {
    for (int n = 0; n < N; ++n)
        for (int r = 0; r < 4; ++r) {
            const auto& v = sums[n][r];
            out[n][r] = ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
        }
}
#endif

// Sum of the products of two rows. Four sums at a time, as each has to wait for itself.
inline float line(const float* w, const float* x, int width) {
    Floats sums[4] = {};
    int k = 0;
    for (; k + 4 * LANES <= width; k += 4 * LANES)
        for (int i = 0; i < 4; ++i) sums[i] += load(w + k + i * LANES) * load(x + k + i * LANES);
    float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; k < width; ++k) total += w[k] * x[k];
    return total;
}

// ---------------------------------------------------------------- tiles

// The most inputs of a tile of R rows: its sums, weights and one input fill the registers.
#if defined(__AVX512BW__)
template <int R, class Input> constexpr int INPUTS = R > 4 ? 1 : 4;
#else
template <int R, class Input> constexpr int INPUTS = R > 4 ? 1 : sizeof(Input) == 4 ? 3 : 2;
#endif

// Memory that a tile fetches while it computes, as a core fetches too little by itself: from here
// on, at each step `stride` bytes further.
struct Ahead {
    const char* at;
    int stride;
};
constexpr int AHEAD = 16384, LINE = 64;  // bytes

template <class Input> constexpr int STEP = sizeof(load((const Input*)0)) / sizeof(Input);

template <int R, int N, class Vector, class Weight, class Input, class Sums>
[[gnu::always_inline]] inline void add_step(const Weight* const* rows, const Input* x, int width,
                                            int k, Sums (&sums)[N * R / 4][4]) {
    Vector weights[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) weights[r] = load(rows[r] + k), hold(weights[r]);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
        Vector inputs = load(x + (int64_t)n * width + k);
        hold(inputs);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            Sums& own = sums[(n * R + r) / 4][r % 4];
            own = add_products(own, weights[r], inputs);
        }
    }
}

// out[n][r] = sum over k of rows[r][k] x[n][k], by N inputs, with LINES to fetch at each step. Each
// sum is taken along k by itself, so its bits do not depend on N.
template <int R, int N, int LINES, class Weight, class Input, class Number>
[[gnu::noinline]] void tile(const Weight* const* weights, const Input* x, int width, Ahead ahead,
                            Number (*out)[R]) {
    typedef decltype(load(x)) Vector;
    typedef decltype(sums_for(Vector{})) Sums;
    constexpr int STEP = ::STEP<Input>;
    const Weight* rows[R];
    std::copy_n(weights, R, rows);
    Sums sums[N * R / 4][4] = {};
    int k = 0;
    for (; k + STEP <= width; k += STEP, ahead.at += ahead.stride) {
#pragma GCC unroll 8
        for (int i = 0; i < LINES; ++i) __builtin_prefetch(ahead.at + i * LINE, 0, 2);
        add_step<R, N, Vector>(rows, x, width, k, sums);
    }
    if (k < width) {  // what is left of each row, filled up with zeros
        Weight last[R][STEP] = {};
        Input own[N][STEP] = {};
        for (int r = 0; r < R; ++r)
            rows[r] = (Weight*)memcpy(last[r], rows[r] + k, (width - k) * sizeof(Weight));
        for (int n = 0; n < N; ++n)
            memcpy(own[n], x + (int64_t)n * width + k, (width - k) * sizeof(Input));
        add_step<R, N, Vector>(rows, *own, STEP, 0, sums);
    }
    add_up<N * R / 4>(sums, (Number(*)[4])out);
}

template <int R, int LINES, class Weight, class Input, class Number>
inline void tile(const Weight* const* rows, const Input* x, int width, int count, Ahead ahead,
                 Number (*out)[R]) {
    constexpr int MOST = INPUTS<R, Input>;
    switch (count) {
        case 1: return tile<R, 1, LINES>(rows, x, width, ahead, out);
        case 2: return tile<R, std::min(2, MOST), LINES>(rows, x, width, ahead, out);
        case 3: return tile<R, std::min(3, MOST), LINES>(rows, x, width, ahead, out);
        case 4: return tile<R, std::min(4, MOST), LINES>(rows, x, width, ahead, out);
    }
}

// All inputs by R rows, of which `some` are wanted. LINES: those to fetch, from `ahead` on, for each
// step along the rows. Tiles share them if there are as many.
template <int R, int LINES, class Weight, class Input, class Number>
void tiles(const Weight* const* rows, const Input* x, int width, int count, const char* ahead,
           int some, Number* out, int64_t stride) {
    constexpr int MOST = INPUTS<R, Input>;
    const int all = (count + MOST - 1) / MOST;
    for (int n = 0, number = 0, many; n < count; n += many, ++number) {
        const int left = count - n;
        many = left == MOST + 1 ? (left + 1) / 2 : std::min(left, MOST);
        const Input* from = x + (int64_t)n * width;
        Number own[MOST][R];
        if (all < LINES && !number)
            tile<R, LINES>(rows, from, width, many, Ahead{ahead, LINES * LINE}, own);
        else if (number >= LINES || all < LINES)
            tile<R, 0>(rows, from, width, many, Ahead{}, own);
        else
            tile<R, 1>(rows, from, width, many,
                       Ahead{ahead + (int64_t)number * (width / STEP<Input>) * LINE, LINE}, own);
        for (int i = 0; i < many; ++i) {
            Number* to = out + (n + i) * stride;
            if (some == R)
                memcpy(to, own[i], sizeof(own[i]));
            else
                std::copy_n(own[i], some, to);
        }
    }
}

inline void widen(const uint16_t* from, int width, float* to) {
    for (int k = 0; k < width; ++k) {
        const uint32_t bits = (uint32_t)from[k] << 16;
        memcpy(to + k, &bits, 4);
    }
}
inline void widen(const int8_t* from, int width, int16_t* to) {
    for (int k = 0; k < width; ++k) to[k] = from[k];
}

// `multiply` by R rows at a time.
template <int R, class Weight, class Input, class Number>
void multiply_by(const Weight* w, int begin, int end, const Input* x, int width, int count,
                 Number* out, int64_t stride) {
    constexpr int LINES = R > 4 ? 0 : std::max<int>(R * STEP<Input> * sizeof(Weight) / LINE, 1);
    for (int r = begin; r < end; r += R) {
        const int some = std::min(R, end - r);
        const Weight* rows[R];  // none beyond the last
        for (int i = 0; i < R; ++i) rows[i] = w + (int64_t)(r + std::min(i, some - 1)) * width;
        const char* ahead = (const char*)rows[0] + AHEAD;
        if constexpr (sizeof(Weight) < sizeof(Input))
            if (count > INPUTS<R, Input>) {  // else each tile would widen them
                thread_local Buffer<Input> wide;
                const int row = (width + SHORTS - 1) / SHORTS * SHORTS;
                wide.resize(R * row);
                const Input* own[R];
                for (int i = 0; i < R; ++i) {
                    own[i] = wide.data() + i * row;
                    widen(rows[i], width, wide.data() + i * row);
                }
                tiles<R, LINES>(own, x, width, count, ahead, some, out + r, stride);
                continue;
            }
        tiles<R, LINES>(rows, x, width, count, ahead, some, out + r, stride);
    }
}

// out[n][r] = sum over k of w[r][k] x[n][k], for some rows of weights and all inputs.
template <class Weight, class Input, class Number>
void multiply(const Weight* w, int begin, int end, const Input* x, int width, int count,
              Number* out, int64_t stride) {
    // Long rows of one input come faster by eight, and as the core fetches them by itself.
    if constexpr (sizeof(Weight) == sizeof(float))
        if (count == 1)
            return multiply_by<8>(w, begin, end, x, width, count, out, stride);
    multiply_by<4>(w, begin, end, x, width, count, out, stride);
}

}  // namespace
