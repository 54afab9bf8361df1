// What stands between the matrix products of a training step, each a single pass over memory.
//
// Forward and backward of RMSNorm, of RoPE for the heads with or without a norm before it, of the
// gate of GeGLU and SwiGLU, of attention and of the cross-entropy. All compute in float32; what
// stands beside products of bf16 reads and writes either type. The equations are those of
// looptx_core/model (norm.py, rope.py, block.py, loop.py), and a test holds both together. Sums over
// rows are taken thread by thread in a fixed order, so that the same number of threads gives the
// same bits.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <type_traits>
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

// A number of bfloat16.
struct Half {
    uint16_t bits;
    operator float() const { return __builtin_bit_cast(float, (uint32_t)bits << 16); }
};

// Stores a number; in bf16 rounded to the nearest even. By integers and with no temporary of `Half`,
// so that loops become vectors.
inline void put(float& to, float x) { to = x; }
inline void put(Half& to, float x) {
    const uint32_t whole = __builtin_bit_cast(uint32_t, x);
    const uint32_t upper = (whole + 0x7fff + (whole >> 16 & 1)) >> 16;
    to.bits = (whole & 0x7fffffff) > 0x7f800000 ? 0x7fc0u : upper;  // one NaN for all
}

// work(a null pointer of the type of numbers): bf16 where `half`, else float32.
template <class Work> void typed(int64_t half, const Work& work) {
    half ? work((Half*)nullptr) : work((float*)nullptr);
}

// The threads' rows of `width` sums, added up in their order.
void add_up(const std::vector<float>& parts, int threads, int64_t width, float* out) {
    std::fill(out, out + width, 0.f);
    for (int t = 0; t < threads; ++t)
        for (int64_t i = 0; i < width; ++i) out[i] += parts[t * width + i];
}

template <class T> inline float inverse_rms(const T* x, int64_t width, float eps) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; ++i) {
        const float one = x[i];
        sum += one * one;
    }
    return 1.f / std::sqrt(sum / (float)width + eps);
}

// One row of RMSNorm's backward: dx from dy, and the row's part of the weight's gradient, if wanted.
template <class T, class D>
inline void norm_backward(const D* dy, const T* x, const float* weight, float inverse,
                          int64_t width, T* dx, float* dweight) {
    float dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t i = 0; i < width; ++i) dot += (float)dy[i] * weight[i] * (float)x[i];
    const float pull = dot * inverse * inverse * inverse / (float)width;
    if (dweight)
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) dweight[i] += (float)dy[i] * (float)x[i] * inverse;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i)
        put(dx[i], (float)dy[i] * weight[i] * inverse - (float)x[i] * pull);
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

// An activation and its slope: gelu by the error function, or silu.
inline void activate(bool silu, float x, float& y, float& slope) {
    if (silu) {
        const float e = exp_below(-std::fabs(x)), below = 1.f / (1.f + e);
        const float share = x < 0 ? e * below : below;
        y = x * share, slope = share * (1.f + x * (1.f - share));
    } else {
        float phi, density;
        normal(x, phi, density);
        // Beyond 14 the density is nothing, but its exponential is not below e^-87.
        y = x * phi, slope = phi + std::min(std::max(x, -14.f), 14.f) * density;
    }
}

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
typedef float Floats __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
constexpr int PANEL = 2 * LANES, STRIP = 6, BLOCK = 8 * STRIP;

// What `Attention` has of a tensor of heads: where a row's, a head's and a position's numbers are.
struct Heads {
    float* data;
    int64_t batch, head, place;
    float* at(int64_t b, int64_t h, int64_t l = 0) const {
        return data + b * batch + h * head + l * place;
    }
};

// The right side of a product, (depth, columns), in panels of PANEL columns: each panel lies in one
// piece, as columns of a wide matrix would fall on the same few lines of the cache.
struct Panels {
    int64_t depth = 0;
    std::vector<float> data;

    void fill(const float* x, int64_t along, int64_t across, int64_t depth_, int64_t columns) {
        depth = depth_;
        data.assign((columns + PANEL - 1) / PANEL * PANEL * depth, 0.f);
        for (int64_t j = 0; j < columns; j += PANEL) {
            const int64_t wide = std::min<int64_t>(PANEL, columns - j);
            float* to = &data[j * depth];
            if (across == 1)
                for (int64_t p = 0; p < depth; ++p)
                    std::copy_n(x + p * along + j, wide, to + p * PANEL);
            else
                for (int64_t n = 0; n < wide; ++n)
                    for (int64_t p = 0; p < depth; ++p)
                        to[p * PANEL + n] = x[p * along + (j + n) * across];
        }
    }
};

// A strip of rows by a panel. TURNED: a(i, p) is a[p * step + i], else a[i * step + p].
template <int ROWS, bool TURNED>
inline void tile(int64_t depth, const float* a, int64_t step, const float* b, float* c, int64_t ci,
                 int64_t wide, bool add) {
    Floats sums[ROWS][2] = {};
    for (int64_t p = 0; p < depth; ++p) {
        const Floats low = *(const Floats*)(b + p * PANEL);
        const Floats high = *(const Floats*)(b + p * PANEL + LANES);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r) {
            const float one = TURNED ? a[p * step + r] : a[r * step + p];
            sums[r][0] += one * low, sums[r][1] += one * high;
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        float* out = c + r * ci;
        if (wide == PANEL) {
            Floats &low = *(Floats*)out, &high = *(Floats*)(out + LANES);
            low = add ? low + sums[r][0] : sums[r][0];
            high = add ? high + sums[r][1] : sums[r][1];
        } else
            for (int64_t n = 0; n < wide; ++n) {
                const float sum = sums[r][n / LANES][n % LANES];
                out[n] = add ? out[n] + sum : sum;
            }
    }
}

// Where the causal triangle, queries by columns, stands in a product: only numbers with
// column <= query + `ahead` are wanted of the result, or are not 0 in a.
enum Causal { OF_RESULT, OF_LEFT };

// c[i][j] = sum over p of a(i, p) b(p + skip, j + from), or added to what is there; `from` is a
// multiple of PANEL. For matrices that fit a core's cache. What the causal triangle leaves out is
// skipped by whole strips: of the result, or of a, whose queries are the depth where it is TURNED.
template <bool TURNED, Causal CAUSAL>
void product(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t step,
             const Panels& b, int64_t skip, int64_t from, float* c, int64_t ci, bool add,
             int64_t ahead) {
    for (int64_t j = 0; j < columns; j += PANEL) {
        const float* right = &b.data[(j + from) * b.depth + skip * PANEL];
        const int64_t wide = std::min<int64_t>(PANEL, columns - j);
        int64_t i = CAUSAL == OF_RESULT ? std::max<int64_t>(0, (j - ahead) / STRIP * STRIP) : 0;
        for (int64_t left; (left = rows - i) > 0;) {
            const int64_t strip = left >= STRIP ? STRIP : left >= 4 ? 4 : 1;
            int64_t low = 0, high = depth;
            if (CAUSAL == OF_LEFT && TURNED) low = std::max<int64_t>(0, i - ahead);
            if (CAUSAL == OF_LEFT && !TURNED) high = std::min(depth, i + strip + ahead);
            const float* one = a + (TURNED ? low * step + i : i * step + low);
            const float* two = right + low * PANEL;
            float* out = c + i * ci + j;
            if (strip == STRIP)
                tile<STRIP, TURNED>(high - low, one, step, two, out, ci, wide, add);
            else if (strip == 4)
                tile<4, TURNED>(high - low, one, step, two, out, ci, wide, add);
            else
                tile<1, TURNED>(high - low, one, step, two, out, ci, wide, add);
            i += strip;
        }
    }
}

// Causal attention of one key head and the query heads that share it, in blocks of queries: what a
// block sees are the columns from `from` to `seen`, filled up to whole panels: `wide` of them.
struct Attention {
    int64_t length, width;
    const int32_t* first;  // (length,): the first column that a query sees
    int64_t padded = ((length + PANEL - 1) / PANEL | 1) * PANEL;  // odd, to spread over the cache
    int64_t begin = 0, rows = 0, from = 0, seen = 0, wide = 0;

    void block(int64_t begin_) {
        begin = begin_, rows = std::min<int64_t>(BLOCK, length - begin);
        seen = begin + rows, from = first[begin] / PANEL * PANEL;
        wide = (seen + PANEL - 1) / PANEL * PANEL - from;
    }

    // Rows of `padded`: each query's products with the columns that the block sees.
    void scores(const float* q, int64_t place, const Panels& across, float* out) const {
        product<false, OF_RESULT>(rows, wide, width, q, place, across, 0, from, out, padded, false,
                                  begin - from);
    }

    // make(r, row, low, high) for each query's columns; the others become 0.
    template <class Make> void each_row(float* out, const Make& make) const {
        for (int64_t r = 0; r < rows; ++r) {
            float* row = out + r * padded;
            const int64_t low = first[begin + r] - from, high = begin + r + 1 - from;
            std::fill(row, row + low, 0.f);
            std::fill(row + high, row + wide, 0.f);
            make(r, row, low, high);
        }
    }
};

}  // namespace

extern "C" {

// x and y, and their gradients, of one type; `half`: bf16, here and below.
void looptx_norm(int threads, int64_t half, int64_t rows, int64_t width, float eps, const void* x,
                 const float* weight, void* y, float* inverse) {
    typed(half, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        share(threads, rows, [&](int, int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                const T* in = (const T*)x + row * width;
                const float r = inverse[row] = inverse_rms(in, width, eps);
                T* out = (T*)y + row * width;
#pragma omp simd
                for (int64_t i = 0; i < width; ++i) put(out[i], (float)in[i] * r * weight[i]);
            }
        });
    });
}

// dweight: null where the weight does not train.
void looptx_norm_backward(int threads, int64_t half, int64_t rows, int64_t width, const void* dy,
                          const void* x, const float* weight, const float* inverse, void* dx,
                          float* dweight) {
    std::vector<float> parts(threads * width);
    typed(half, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        share(threads, rows, [&](int thread, int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row)
                norm_backward((const T*)dy + row * width, (const T*)x + row * width, weight,
                              inverse[row], width, (T*)dx + row * width,
                              dweight ? &parts[thread * width] : nullptr);
        });
    });
    if (dweight) add_up(parts, threads, width, dweight);
}

// Heads of `width`: x (tokens, heads, width); y likewise, always of float32; cos and signed sin
// (places, width), place of a token: its number modulo `places`. weight, inverse: of the norm; null
// for none.
void looptx_turn(int threads, int64_t half, int64_t tokens, int64_t heads, int64_t width,
                 int64_t places, float eps, const void* x, const float* weight,
                 const float* cosine, const float* sine, float* y, float* inverse) {
    const int64_t middle = width / 2;
    typed(half, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        share(threads, tokens, [&](int, int64_t begin, int64_t end) {
            for (int64_t row = begin * heads; row < end * heads; ++row) {
                const T* in = (const T*)x + row * width;
                const float* c = cosine + row / heads % places * width;
                const float* s = sine + row / heads % places * width;
                const float r = weight ? inverse[row] = inverse_rms(in, width, eps) : 1.f;
                float* out = y + row * width;
                const auto turn = [&](const auto& scaled) {
#pragma omp simd
                    for (int64_t i = 0; i < middle; ++i) {
                        const float low = scaled(i), high = scaled(i + middle);
                        out[i] = low * c[i] + high * s[i];
                        out[i + middle] = high * c[i + middle] + low * s[i + middle];
                    }
                };
                if (weight)
                    turn([&](int64_t i) { return (float)in[i] * r * weight[i]; });
                else
                    turn([&](int64_t i) { return (float)in[i]; });
            }
        });
    });
}

void looptx_turn_backward(int threads, int64_t half, int64_t tokens, int64_t heads, int64_t width,
                          int64_t places, const float* dy, const void* x, const float* weight,
                          const float* cosine, const float* sine, const float* inverse, void* dx,
                          float* dweight) {
    const int64_t middle = width / 2;
    std::vector<float> parts(threads * width);
    typed(half, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        share(threads, tokens, [&](int thread, int64_t begin, int64_t end) {
            std::vector<float> back(width);
            for (int64_t row = begin * heads; row < end * heads; ++row) {
                const float* d = dy + row * width;
                const float* c = cosine + row / heads % places * width;
                const float* s = sine + row / heads % places * width;
                T* out = (T*)dx + row * width;
                const auto turn = [&](auto* b) {
#pragma omp simd
                    for (int64_t i = 0; i < middle; ++i) {
                        put(b[i], d[i] * c[i] + d[i + middle] * s[i + middle]);
                        put(b[i + middle], d[i + middle] * c[i + middle] + d[i] * s[i]);
                    }
                };
                if (!weight) {
                    turn(out);
                    continue;
                }
                turn(back.data());
                norm_backward(back.data(), (const T*)x + row * width, weight, inverse[row], width,
                              out, dweight ? &parts[thread * width] : nullptr);
            }
        });
    });
    if (dweight) add_up(parts, threads, width, dweight);
}

// All of one type. silu: the gate's activation, else gelu.
void looptx_gate(int threads, int64_t half, int64_t silu, int64_t count, const void* gate,
                 const void* up, void* y) {
    typed(half, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const T *g = (const T*)gate, *u = (const T*)up;
        T* out = (T*)y;
        share(threads, count, [&](int, int64_t begin, int64_t end) {
            const auto run = [&](bool is_silu) {
#pragma omp simd
                for (int64_t i = begin; i < end; ++i) {
                    float active, slope;
                    activate(is_silu, g[i], active, slope);
                    put(out[i], active * (float)u[i]);
                }
            };
            silu ? run(true) : run(false);
        });
    });
}

void looptx_gate_backward(int threads, int64_t half, int64_t silu, int64_t count, const void* dy,
                          const void* gate, const void* up, void* dgate, void* dup) {
    typed(half, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const T *d = (const T*)dy, *g = (const T*)gate, *u = (const T*)up;
        T *to_gate = (T*)dgate, *to_up = (T*)dup;
        share(threads, count, [&](int, int64_t begin, int64_t end) {
            const auto run = [&](bool is_silu) {
#pragma omp simd
                for (int64_t i = begin; i < end; ++i) {
                    float active, slope;
                    activate(is_silu, g[i], active, slope);
                    const float push = d[i];
                    put(to_up[i], push * active);
                    put(to_gate[i], push * (float)u[i] * slope);
                }
            };
            silu ? run(true) : run(false);
        });
    });
}

// Of each row of logits, (rows, classes): the loss of its target, not a number where there is no such
// class; whether the target is the largest, or one of them; the largest's share; the log of the sum of
// all exponentials.
void looptx_cross_entropy(int threads, int64_t half, int64_t rows, int64_t classes,
                          const void* logits, const int64_t* targets, float* losses, float* hits,
                          float* tops, float* log_sums) {
    typed(half, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        share(threads, rows, [&](int, int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                const T* x = (const T*)logits + row * classes;
                float most = x[0], sum = 0;
#pragma omp simd reduction(max : most)
                for (int64_t i = 0; i < classes; ++i) {
                    const float one = x[i];
                    most = one > most ? one : most;
                }
#pragma omp simd reduction(+ : sum)
                for (int64_t i = 0; i < classes; ++i) sum += exp_below((float)x[i] - most);
                log_sums[row] = most + std::log(sum);
                tops[row] = 1.f / sum;
                const bool known = targets[row] >= 0 && targets[row] < classes;
                losses[row] = known ? log_sums[row] - (float)x[targets[row]] : NAN;
                hits[row] = known && (float)x[targets[row]] == most;
            }
        });
    });
}

void looptx_cross_entropy_backward(int threads, int64_t half, int64_t rows, int64_t classes,
                                   const float* dlosses, const void* logits,
                                   const int64_t* targets, const float* log_sums, void* dlogits) {
    typed(half, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        share(threads, rows, [&](int, int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                const T* x = (const T*)logits + row * classes;
                const float push = dlosses[row], sum = log_sums[row];
                T* dx = (T*)dlogits + row * classes;
#pragma omp simd
                for (int64_t i = 0; i < classes; ++i)
                    put(dx[i], push * exp_below(std::min((float)x[i] - sum, 0.f)));
                if (targets[row] >= 0 && targets[row] < classes) {
                    const float own = x[targets[row]];
                    put(dx[targets[row]], push * (exp_below(std::min(own - sum, 0.f)) - 1.f));
                }
            }
        });
    });
}

// Queries (batch, kv_heads * group, length, width) in any layout whose last stride is 1, and so keys
// and values; first (batch, length): see above. out: of the queries' shape; log_sums (batch, heads,
// length): of each query's exponentials.
void looptx_attend(int threads, int64_t batch, int64_t kv_heads, int64_t group, int64_t length,
                   int64_t width, float scale, const int32_t* first, const Heads* tensors,
                   float* log_sums) {
    const Heads &q = tensors[0], &k = tensors[1], &v = tensors[2], &out = tensors[3];
    std::atomic<int64_t> next{0};
    share(threads, threads, [&](int, int64_t, int64_t) {
        Panels keys, values;
        std::vector<float> chances;
        for (int64_t task; (task = next++) < batch * kv_heads;) {
            const int64_t b = task / kv_heads, own = task % kv_heads;
            Attention at{length, width, first + b * length};
            keys.fill(k.at(b, own), 1, k.place, width, length);
            values.fill(v.at(b, own), v.place, 1, length, width);
            chances.resize(BLOCK * at.padded);
            for (int64_t h = own * group; h < (own + 1) * group; ++h)
                for (int64_t i = 0; i < length; i += BLOCK) {
                    at.block(i);
                    at.scores(q.at(b, h, i), q.place, keys, chances.data());
                    float* sums = log_sums + (b * kv_heads * group + h) * length + i;
                    at.each_row(chances.data(), [&](int64_t r, float* row, int64_t low,
                                                    int64_t high) {
                        float most = row[low], sum = 0;
#pragma omp simd reduction(max : most)
                        for (int64_t j = low; j < high; ++j) most = row[j] > most ? row[j] : most;
#pragma omp simd reduction(+ : sum)
                        for (int64_t j = low; j < high; ++j)
                            sum += row[j] = exp_below((row[j] - most) * scale);
                        const float share = 1.f / sum;
                        for (int64_t j = low; j < high; ++j) row[j] *= share;
                        sums[r] = most * scale + std::log(sum);
                    });
                    product<false, OF_LEFT>(at.rows, width, at.seen - at.from, chances.data(),
                                            at.padded, values, at.from, 0, out.at(b, h, i),
                                            out.place, false, i - at.from);
                }
        }
    });
}

// tensors: queries, keys, values, the output and its gradient, and the gradients of the first three.
void looptx_attend_backward(int threads, int64_t batch, int64_t kv_heads, int64_t group,
                            int64_t length, int64_t width, float scale, const int32_t* first,
                            const Heads* tensors, const float* log_sums) {
    const Heads &q = tensors[0], &k = tensors[1], &v = tensors[2], &out = tensors[3];
    const Heads &dout = tensors[4], &dq = tensors[5], &dk = tensors[6], &dv = tensors[7];
    std::atomic<int64_t> next{0};
    share(threads, threads, [&](int, int64_t, int64_t) {
        Panels keys, values, plain_keys, queries, pushes;
        std::vector<float> chances, pulls;
        for (int64_t task; (task = next++) < batch * kv_heads;) {
            const int64_t b = task / kv_heads, own = task % kv_heads;
            Attention at{length, width, first + b * length};
            keys.fill(k.at(b, own), 1, k.place, width, length);
            values.fill(v.at(b, own), 1, v.place, width, length);
            plain_keys.fill(k.at(b, own), k.place, 1, length, width);
            chances.resize(BLOCK * at.padded), pulls.resize(BLOCK * at.padded);
            for (int64_t l = 0; l < length; ++l) {
                std::fill_n(dk.at(b, own, l), width, 0.f);
                std::fill_n(dv.at(b, own, l), width, 0.f);
            }
            for (int64_t h = own * group; h < (own + 1) * group; ++h)
                for (int64_t i = 0; i < length; i += BLOCK) {
                    at.block(i);
                    const float* sums = log_sums + (b * kv_heads * group + h) * length + i;
                    at.scores(q.at(b, h, i), q.place, keys, chances.data());
                    at.scores(dout.at(b, h, i), dout.place, values, pulls.data());
                    at.each_row(chances.data(), [&](int64_t r, float* row, int64_t low,
                                                    int64_t high) {
                        const float sum = sums[r];
#pragma omp simd
                        for (int64_t j = low; j < high; ++j)
                            row[j] = exp_below(std::min(row[j] * scale - sum, 0.f));
                    });
                    at.each_row(pulls.data(), [&](int64_t r, float* row, int64_t low,
                                                  int64_t high) {
                        const float *one = dout.at(b, h, i + r), *two = out.at(b, h, i + r);
                        const float* chance = chances.data() + r * at.padded;
                        float mean = 0;
#pragma omp simd reduction(+ : mean)
                        for (int64_t d = 0; d < width; ++d) mean += one[d] * two[d];
#pragma omp simd
                        for (int64_t j = low; j < high; ++j)
                            row[j] = chance[j] * (row[j] - mean) * scale;
                    });
                    const int64_t columns = at.seen - at.from, ahead = i - at.from;
                    queries.fill(q.at(b, h, i), q.place, 1, at.rows, width);
                    pushes.fill(dout.at(b, h, i), dout.place, 1, at.rows, width);
                    product<true, OF_LEFT>(columns, width, at.rows, chances.data(), at.padded,
                                           pushes, 0, 0, dv.at(b, own, at.from), dv.place, true,
                                           ahead);
                    product<true, OF_LEFT>(columns, width, at.rows, pulls.data(), at.padded,
                                           queries, 0, 0, dk.at(b, own, at.from), dk.place, true,
                                           ahead);
                    product<false, OF_LEFT>(at.rows, width, columns, pulls.data(), at.padded,
                                            plain_keys, at.from, 0, dq.at(b, h, i), dq.place,
                                            false, ahead);
                }
        }
    });
}
}
