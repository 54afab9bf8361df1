// What stands between the matrix products of a training step, each a single pass over memory.
//
// Forward and backward of RMSNorm, of RMSNorm with RoPE for the heads, and of GeGLU; float32,
// contiguous. The equations are those of looptx_core/model (norm.py, rope.py, block.py), and a
// test holds both together. Sums over rows are taken thread by thread in a fixed order, so that
// the same number of threads gives the same bits.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

// torch's own threads, where its OpenMP is GNU's: a second pool would fight it for the cores.
extern "C" {
void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned) __attribute__((weak));
int omp_get_thread_num() __attribute__((weak));
int omp_get_num_threads() __attribute__((weak));
}

namespace {

// work(thread, begin, end) for each thread's share of 0 .. count.
template <class Work> void share(int threads, int64_t count, const Work& work) {
    struct Job {
        const Work& work;
        int64_t count;
    } job{work, count};
    if (threads < 2 || !GOMP_parallel || !omp_get_thread_num || !omp_get_num_threads) {
        work(0, 0, count);
        return;
    }
    GOMP_parallel(
        [](void* given) {
            const Job& job = *static_cast<Job*>(given);
            const int64_t here = omp_get_thread_num(), all = omp_get_num_threads();
            job.work((int)here, job.count * here / all, job.count * (here + 1) / all);
        },
        &job, threads, 0);
}

// The threads' rows of `width` sums, added up in their order.
void add_up(const std::vector<float>& parts, int threads, int64_t width, float* out) {
    std::fill(out, out + width, 0.f);
    for (int t = 0; t < threads; ++t)
        for (int64_t i = 0; i < width; ++i) out[i] += parts[t * width + i];
}

inline float inverse_rms(const float* x, int64_t width, float eps) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; ++i) sum += x[i] * x[i];
    return 1.f / std::sqrt(sum / (float)width + eps);
}

// One row of RMSNorm's backward: dx from dy, and the row's part of the weight's gradient.
inline void norm_backward(const float* dy, const float* x, const float* weight, float inverse,
                          int64_t width, float* dx, float* dweight) {
    float dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t i = 0; i < width; ++i) dot += dy[i] * weight[i] * x[i];
    const float pull = dot * inverse * inverse * inverse / (float)width;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
        dweight[i] += dy[i] * x[i] * inverse;
        dx[i] = dy[i] * weight[i] * inverse - x[i] * pull;
    }
}

// e^x for x <= 0, to 2e-7 of its value.
inline float exp_below(float x) {
    x = std::max(x, -87.f);
    const int whole = (int)(x * 1.44269504f - 0.5f);
    const float r = (x - (float)whole * 0.693359375f) + (float)whole * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return (p * r * r + r + 1.f) * __builtin_bit_cast(float, (whole + 127) << 23);
}

// The normal distribution's Phi, to 1e-7, and its density (Abramowitz and Stegun, 7.1.26).
inline void normal(float x, float& phi, float& density) {
    const float z = std::fabs(x) * 0.70710678f, e = exp_below(-z * z);
    const float t = 1.f / (1.f + 0.3275911f * z);
    float p = 1.061405429f;
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const float tail = 0.5f * p * t * e;
    phi = x < 0 ? tail : 1.f - tail;
    density = 0.39894228f * e;
}

}  // namespace

extern "C" {

void looptx_norm(int threads, int64_t rows, int64_t width, float eps, const float* x,
                 const float* weight, float* y, float* inverse) {
    share(threads, rows, [&](int, int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const float *in = x + row * width, r = inverse[row] = inverse_rms(in, width, eps);
            float* out = y + row * width;
#pragma omp simd
            for (int64_t i = 0; i < width; ++i) out[i] = in[i] * r * weight[i];
        }
    });
}

void looptx_norm_backward(int threads, int64_t rows, int64_t width, const float* dy,
                          const float* x, const float* weight, const float* inverse, float* dx,
                          float* dweight) {
    std::vector<float> parts(threads * width);
    share(threads, rows, [&](int thread, int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row)
            norm_backward(dy + row * width, x + row * width, weight, inverse[row], width,
                          dx + row * width, &parts[thread * width]);
    });
    add_up(parts, threads, width, dweight);
}

// Heads of `width`: x (tokens, heads, width); cos and signed sin (places, width), place of a
// token: its number modulo `places`.
void looptx_turn(int threads, int64_t tokens, int64_t heads, int64_t width, int64_t places,
                 float eps, const float* x, const float* weight, const float* cosine,
                 const float* sine, float* y, float* inverse) {
    const int64_t half = width / 2;
    share(threads, tokens, [&](int, int64_t begin, int64_t end) {
        for (int64_t row = begin * heads; row < end * heads; ++row) {
            const float *in = x + row * width, r = inverse[row] = inverse_rms(in, width, eps);
            const float* c = cosine + row / heads % places * width;
            const float* s = sine + row / heads % places * width;
            float* out = y + row * width;
#pragma omp simd
            for (int64_t i = 0; i < half; ++i) {
                const float low = in[i] * r * weight[i], high = in[i + half] * r * weight[i + half];
                out[i] = low * c[i] + high * s[i];
                out[i + half] = high * c[i + half] + low * s[i + half];
            }
        }
    });
}

void looptx_turn_backward(int threads, int64_t tokens, int64_t heads, int64_t width,
                          int64_t places, const float* dy, const float* x, const float* weight,
                          const float* cosine, const float* sine, const float* inverse, float* dx,
                          float* dweight) {
    const int64_t half = width / 2;
    std::vector<float> parts(threads * width);
    share(threads, tokens, [&](int thread, int64_t begin, int64_t end) {
        std::vector<float> back(width);
        float* b = back.data();
        for (int64_t row = begin * heads; row < end * heads; ++row) {
            const float* d = dy + row * width;
            const float* c = cosine + row / heads % places * width;
            const float* s = sine + row / heads % places * width;
#pragma omp simd
            for (int64_t i = 0; i < half; ++i) {
                b[i] = d[i] * c[i] + d[i + half] * s[i + half];
                b[i + half] = d[i + half] * c[i + half] + d[i] * s[i];
            }
            norm_backward(b, x + row * width, weight, inverse[row], width, dx + row * width,
                          &parts[thread * width]);
        }
    });
    add_up(parts, threads, width, dweight);
}

void looptx_gelu_gate(int threads, int64_t count, const float* gate, const float* up, float* y) {
    share(threads, count, [&](int, int64_t begin, int64_t end) {
#pragma omp simd
        for (int64_t i = begin; i < end; ++i) {
            float phi, density;
            normal(gate[i], phi, density);
            y[i] = gate[i] * phi * up[i];
        }
    });
}

void looptx_gelu_gate_backward(int threads, int64_t count, const float* dy, const float* gate,
                               const float* up, float* dgate, float* dup) {
    share(threads, count, [&](int, int64_t begin, int64_t end) {
#pragma omp simd
        for (int64_t i = begin; i < end; ++i) {
            float phi, density;
            normal(gate[i], phi, density);
            dup[i] = dy[i] * gate[i] * phi;
            dgate[i] = dy[i] * up[i] * (phi + gate[i] * density);
        }
    });
}
}
