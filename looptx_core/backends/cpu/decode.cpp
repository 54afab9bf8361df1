// The moves of a looped transformer for a few tokens at a time, on the CPU.
//
// A pass takes n rows. Each row is one token: it has a row of the cache, a column in it, and its
// own loop. All rows share every read of the weights, which is what decoding waits for. The
// equations are those of looptx_core/model (loop.py, block.py, memory.py, confidence.py); a test
// holds both together. Weights are float32, bfloat16, 8-bit with a scale a row, or ternary with two
// bits each.

#include "pool.h"
#include "products.h"

extern "C" {

constexpr int32_t LOOPTX_ABI_VERSION = 6;  // structs.py has it too

enum Injection : int32_t { NONE, BY_CHANNEL, BRIDGE, NORM, HALF_STEPS };
enum MemoryKind : int32_t { NO_MEMORY, INFINI, INFINI_DELTA, DELTA };

struct Block {
    Matrix q, k, v, o, gate, up, down;
    const float *attention_norm, *mlp_norm, *q_norm, *k_norm;  // q_norm, k_norm: or null
    const float *o_norm, *down_norm;                           // inside ternary layers, or null
    const float *q_bias, *k_bias, *v_bias;                     // or null
    // Of a memory, else null: (heads,), and of DELTA (heads, d_model), (2, kv_heads, 2 * head_dim)
    // and (2, kv_heads), those for what is written before those for what is kept.
    const float *gate_bias, *gate_weight, *write_weight, *write_bias;
};

struct Model {
    int32_t d_model, heads, kv_heads, head_dim, d_ff, vocab;
    int32_t prelude, core, coda, max_loops;
    int32_t silu, injection;  // injection: an `Injection`
    int32_t memory, memory_window, memory_block;  // memory: a `MemoryKind`
    float eps;
    const Block* blocks;  // prelude, core, coda
    // Of the injection: all four BY_CHANNEL, the first beside a BRIDGE, first and last as a NORM.
    const float *state_norm, *state_scale, *embedding_norm, *embedding_scale;
    const float *embedding, *norm, *frequencies;
    Matrix bridge, head, confidence_hidden, confidence_gate;
    const float *confidence_norm, *confidence_bias, *confidence_gate_bias, *confidence_loop, *confidence_out, *confidence_out_bias;
    // The first units tell the gain, the others the log-odds. confidence_out: (units,).
    // confidence_out_bias: of the log-odds, then of the gain.
    int32_t gain_units;
};

struct Cache {
    float *const *keys, *const *values;  // of each layer: (depths, batch, kv_heads, capacity, head_dim)
    int64_t depth, row, head;            // strides, in floats
    int32_t depths;                      // slots of a core layer; other layers have one
    // Of a model with a memory. The columns are a ring of `memory_window` slots then.
    int32_t memories, axes;        // of a core layer: one for each slot, or one; axes of a position
    int64_t* positions;            // (axes, batch, memory_window)
    float *const *matrix, *const *norm;  // of each core layer: (memories, batch, kv_heads, head_dim,
                                         // head_dim); (memories, batch, kv_heads, head_dim) or null
    int64_t* const* document;            // of each core layer: (memories, batch)
};

struct Rows {
    int32_t count;
    const int32_t *row, *column, *start, *position;  // (count,) each
};

// When the loop returns to the caller: after `first` passes and more, by the confidence head's
// log-odds or by nats.
struct StopCondition {
    const int32_t *first, *last;          // (count,) each: checked from here on; ended here
    const float *min_odds, *max_nats;     // (count,) each: stops from these log-odds on, below these nats
    int32_t odds, gain;                   // whether any row's exit looks at the one and at the other
    // (depths,) each: nats are e^(offset + slope * gain) * change^power; the gain where depths is 0.
    const float *slope, *power, *offset;
    int32_t depths;

    // output: log-odds, gain, change. The bound is `MAX_LOG_GAIN` of stopping/calibration.py.
    float nats(const float* output, int loop) const {
        if (!depths) return output[1];
        const int index = std::min(loop, depths) - 1;
        const float log =
            offset[index] + slope[index] * output[1] + power[index] * std::log(output[2]);
        return std::exp(std::min(log, 10.0f));
    }
};

}  // extern "C"

namespace {

// e^x to 2 units in the last place: 2^n times a polynomial (Cephes). Loops over it vectorise.
inline float exp_of(float x) {
    x = std::min(std::max(x, -87.0f), 88.0f);
    const float n = std::nearbyint(x * 1.44269504f);
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    const float p = (((((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r +
                       4.1665795894e-2f) * r + 1.6666665459e-1f) * r + 5.0000001201e-1f) * r * r +
                    r + 1.0f;
    const int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

constexpr int MOST_HEAD_DIM = 1024;

inline float erf_of(float x) {  // Abramowitz and Stegun 7.1.26, absolute error below 1.5e-7
    const float a = std::fabs(x), t = 1.0f / (1.0f + 0.3275911f * a);
    const float tail = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t -
                         0.284496736f) * t + 0.254829592f) * t * exp_of(-a * a);
    return std::copysign(1.0f - tail, x);
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exp_of(-x)); }

inline float softplus(float x) { return x > 20 ? x : std::log1p(std::exp(x)); }

// The constants of memory.py.
constexpr float MEMORY_EPS = 1e-6f, FREE_DECAY = 1e-3f;

inline float gelu(float x) { return 0.5f * x * (1.0f + erf_of(x * 0.70710678f)); }

void rms_norm(const float* x, const float* weight, int width, float eps, float* out) {
    const float scale = 1.0f / std::sqrt(line(x, x, width) / width + eps);
    for (int i = 0; i < width; ++i) out[i] = x[i] * scale * weight[i];
}

}  // namespace

// The slots that a row attends to: from `begin` to `end`, and before those, where the store is a
// ring, from `ring_begin` to `ring_end`.
struct Seen {
    int begin, end, ring_begin, ring_end;
};

// Buffers of one pass, and the threads that share it.
struct Runner {
    const Model model;
    Pool pool;
    int room = 0;
    Buffer<float> normed, qkv, attended, hidden, turns, judged, before, backwards;
    std::vector<int32_t> turned;  // the positions that `turns` are of
    Input input;

    Runner(const Model& model, int threads) : model(model), pool(threads) {}

    void make_room(int count) {
        if (count <= room) return;
        room = count;
        const Model& m = model;
        const int64_t n = count, kv = m.kv_heads * m.head_dim, q = m.heads * m.head_dim;
        normed.resize(n * std::max({m.d_model, (int32_t)q, m.d_ff}));
        qkv.resize(n * (q + 2 * kv)), attended.resize(n * q), hidden.resize(n * 2 * m.d_ff);
        turns.resize(n * m.head_dim), judged.resize(2 * n * m.confidence_hidden.rows);
        before.resize(n * m.d_model);
    }

    // The next products read norm(in), or in itself where there is no norm.
    void enter(const float* in, const float* weight, int count, int width, int kind) {
        input.make_room(count, width, kind);
        pool.each(count, 1, [&](int begin, int end) {
            for (int n = begin; n < end; ++n) {
                const float* row = in + (int64_t)n * width;
                float* own = normed.data() + (int64_t)n * width;
                if (weight) rms_norm(row, weight, width, model.eps, own);
                input.round(n, weight ? own : row);
            }
        });
        input.floats = weight ? normed.data() : in;
    }

    // to[n] += m * input[n]
    void add(const Matrix& m, float* to) {
        pool.each(m.rows, unit_of(m), [&](int begin, int end) {
            const int count = input.count;
            thread_local std::vector<float> sums;
            sums.resize((size_t)count * m.rows);
            product(m, begin, end, input, sums.data(), m.rows);
            for (int n = 0; n < count; ++n)
                for (int r = begin; r < end; ++r)
                    to[(int64_t)n * m.rows + r] += sums[(int64_t)n * m.rows + r];
        });
    }

    // Norm and RoPE of a head. plain: takes the head before RoPE, unless it is null.
    void turn(float* at, const float* norm, const float* table, float* plain = nullptr) const {
        const int width = model.head_dim, half = width / 2;
        float own[MOST_HEAD_DIM];
        float* tmp = plain ? plain : own;
        if (norm)
            rms_norm(at, norm, width, model.eps, tmp);
        else
            memcpy(tmp, at, width * sizeof(float));
        for (int i = 0; i < half; ++i) {
            const float cos = table[i], sin = table[half + i];
            at[i] = tmp[i] * cos - tmp[half + i] * sin;
            at[half + i] = tmp[half + i] * cos + tmp[i] * sin;
        }
    }

    // out += the sum of `values`, (length, head_dim), each times its chance.
    void weigh(const float* chances, const float* values, int length, float* out) const {
        const int width = model.head_dim;
        int c = 0;
        for (; c + 4 <= length; c += 4) {  // the sums are read and written once for four
            const float* v = values + (int64_t)c * width;
            const float* four = chances + c;
            for (int i = 0; i < width; ++i)
                out[i] += (four[0] * v[i] + four[1] * v[width + i]) +
                          (four[2] * v[2 * width + i] + four[3] * v[3 * width + i]);
        }
        for (; c < length; ++c)
            for (int i = 0; i < width; ++i) out[i] += chances[c] * values[(int64_t)c * width + i];
    }

    // keys, values: of a row and a head, (slots, head_dim).
    void attend(const float* q, const float* keys, const float* values, const Seen& seen,
                float* out) const {
        const int width = model.head_dim, near = seen.end - seen.begin;
        const int length = near + seen.ring_end - seen.ring_begin;
        const int64_t first = (int64_t)seen.begin * width, again = (int64_t)seen.ring_begin * width;
        const float scale = 1.0f / std::sqrt((float)width);
        thread_local std::vector<float> chances;
        if ((int)chances.size() < length) chances.resize(length + 256);
        float* each = chances.data();
        multiply(keys + first, 0, near, q, width, 1, each, length);
        multiply(keys + again, 0, length - near, q, width, 1, each + near, length);
        float largest = -3e38f, total = 0;
#pragma omp simd reduction(max : largest)
        for (int c = 0; c < length; ++c) largest = std::max(largest, each[c]);
        for (int c = 0; c < length; ++c) each[c] = exp_of((each[c] - largest) * scale);
#pragma omp simd reduction(+ : total)
        for (int c = 0; c < length; ++c) total += each[c];
        for (int i = 0; i < width; ++i) out[i] = 0;
        weigh(each, values + first, near, out);
        weigh(each + near, values + again, length - near, out);
        for (int i = 0; i < width; ++i) out[i] /= total;
    }

    // The slot of a column in a layer's store.
    int slot_of(int column) const {
        return model.memory ? column % model.memory_window : column;
    }

    Seen seen(const Rows& rows, int r) const {
        const int column = rows.column[r], ring = model.memory_window, size = model.memory_block;
        if (!model.memory) return {rows.start[r], column + 1, 0, 0};
        const int oldest = std::max((column / size + 1) * size - ring, 0) % ring;
        return {0, column % ring + 1, oldest ? oldest : ring, ring};
    }

    // out: what some matrices make of the input, one behind the other, rows `stride` apart. They
    // are one range, so that helpers are called once.
    template <int N> void project(const Matrix* const (&parts)[N], float* out, int stride) {
        int all = 0;
        for (const Matrix* part : parts) all += part->rows;
        pool.each(all, unit_of(*parts[0]), [&](int begin, int end) {
            int first = 0;
            for (const Matrix* part : parts) {
                const int from = std::max(begin - first, 0), to = std::min(end - first, part->rows);
                if (from < to) product(*part, from, to, input, out + first, stride);
                first += part->rows;
            }
        });
    }

    // Add a bias, if there is one, to `width` columns of rows that are `stride` apart.
    static void shift(const float* bias, int width, float* to, int stride, int count) {
        if (!bias) return;
        for (int r = 0; r < count; ++r)
            for (int i = 0; i < width; ++i) to[(int64_t)r * stride + i] += bias[i];
    }

    // One block on the rows of `at`, (count, d_model); slot: of the layer's cache, for each row.
    template <class Slot>
    void block(int layer, float* at, const Rows& rows, const Cache& cache, Slot slot) {
        const Model& m = model;
        const Block& b = m.blocks[layer];
        float *keys = cache.keys[layer], *values = cache.values[layer];
        const int n = rows.count, width = m.head_dim, group = m.heads / m.kv_heads;
        const int q = m.heads * width, kv = m.kv_heads * width, all = q + 2 * kv;
        enter(at, b.attention_norm, n, m.d_model, b.q.kind);
        project<3>({&b.q, &b.k, &b.v}, qkv.data(), all);
        shift(b.q_bias, q, qkv.data(), all, n);
        shift(b.k_bias, kv, qkv.data() + q, all, n);
        shift(b.v_bias, kv, qkv.data() + q + kv, all, n);
        const bool remembers = b.gate_bias;
        const int64_t batch = cache.depth / cache.row;
        auto place = [&](int r, int head) {
            return slot(r) * cache.depth + rows.row[r] * cache.row + head * cache.head;
        };
        for (int r = 0; r < n; ++r)
            for (int h = 0; h < m.kv_heads; ++h) {
                float* key = qkv.data() + (int64_t)r * all + q + h * width;
                turn(key, b.k_norm, turns.data() + (int64_t)r * width);
                const int64_t to = place(r, h) + (int64_t)slot_of(rows.column[r]) * width;
                memcpy(keys + to, key, width * sizeof(float));
                memcpy(values + to, key + kv, width * sizeof(float));
            }
        pool.each(n * m.heads, 1, [&](int begin, int end) {
            for (int item = begin; item < end; ++item) {
                const int r = item / m.heads, h = item % m.heads;
                float* query = qkv.data() + (int64_t)r * all + h * width;
                float plain[MOST_HEAD_DIM];
                turn(query, b.q_norm, turns.data() + (int64_t)r * width,
                     remembers ? plain : nullptr);
                const int64_t from = place(r, h / group);
                float* out = attended.data() + (int64_t)r * q + h * width;
                attend(query, keys + from, values + from, seen(rows, r), out);
                if (!remembers || rows.column[r] < m.memory_window) continue;
                const int64_t own = cache.memories > 1 ? slot(r) : 0;
                const int64_t which = (own * batch + rows.row[r]) * m.kv_heads + h / group;
                recall(b, h, normed.data() + (int64_t)r * m.d_model, plain,
                       memory_of(cache, layer - m.prelude, which), out);
            }
        });
        enter(attended.data(), b.o_norm, n, q, b.o.kind);
        add(b.o, at);
        enter(at, b.mlp_norm, n, m.d_model, b.gate.kind);
        pool.each(m.d_ff, unit_of(b.gate), [&](int begin, int end) {
            float* up = hidden.data() + (int64_t)n * m.d_ff;
            product(b.gate, begin, end, input, hidden.data(), m.d_ff);
            product(b.up, begin, end, input, up, m.d_ff);
            for (int r = 0; r < n; ++r) {
                float* gates = hidden.data() + (int64_t)r * m.d_ff;
                const float* ups = up + (int64_t)r * m.d_ff;
                if (m.silu)
                    for (int i = begin; i < end; ++i)
                        gates[i] = gates[i] / (1.0f + exp_of(-gates[i])) * ups[i];
                else
                    for (int i = begin; i < end; ++i) gates[i] = gelu(gates[i]) * ups[i];
            }
        });
        enter(hidden.data(), b.down_norm, n, m.d_ff, b.down.kind);
        add(b.down, at);
    }

    // The angles of RoPE. Of a model that reads without end they are float64, as positions are more
    // than float32 tells apart.
    void find_turns(const Rows& rows) {
        const int half = model.head_dim / 2;
        if ((int)turned.size() == rows.count &&
            std::equal(turned.begin(), turned.end(), rows.position))
            return;
        turned.assign(rows.position, rows.position + rows.count);
        for (int r = 0; r < rows.count; ++r)
            for (int i = 0; i < half; ++i) {
                float* to = turns.data() + (int64_t)r * model.head_dim + i;
                if (model.memory) {
                    const double angle = (double)rows.position[r] * model.frequencies[i];
                    to[0] = (float)std::cos(angle), to[half] = (float)std::sin(angle);
                } else {
                    const float angle = (float)rows.position[r] * model.frequencies[i];
                    to[0] = std::cos(angle), to[half] = std::sin(angle);
                }
            }
    }

    // ------------------------------------------------------------ memory

    // What a key head remembers. norm: null for DELTA.
    struct Memory {
        float *matrix, *norm;
    };

    // which: of (memories, batch, kv_heads), flat.
    Memory memory_of(const Cache& cache, int layer, int64_t which) const {
        const int64_t width = model.head_dim;
        float* norm = cache.norm[layer];
        return {cache.matrix[layer] + which * width * width, norm ? norm + which * width : nullptr};
    }

    // What a memory is read and written by, from a query or key without RoPE, in place.
    void feature(float* x) const {
        const int width = model.head_dim;
        if (model.memory == DELTA) {
            const float scale = 1.0f / std::max(std::sqrt(line(x, x, width)), MEMORY_EPS);
            for (int i = 0; i < width; ++i) x[i] *= scale;
        } else {
            for (int i = 0; i < width; ++i) x[i] = x[i] > 0 ? x[i] + 1 : exp_of(x[i]);
        }
    }

    // out: what a memory returns for a feature.
    void read(const Memory& memory, const float* feature, float* out) const {
        const int width = model.head_dim;
        for (int i = 0; i < width; ++i) out[i] = 0;
        weigh(feature, memory.matrix, width, out);
        if (!memory.norm) return;
        const float scale = 1.0f / std::max(line(feature, memory.norm, width), MEMORY_EPS);
        for (int i = 0; i < width; ++i) out[i] *= scale;
    }

    // Mix what attention gave with what a memory returns, by the head's gate. x: the row that
    // attention read. query: without RoPE, overwritten.
    void recall(const Block& b, int head, const float* x, float* query, const Memory& memory,
                float* out) const {
        const int width = model.head_dim, d = model.d_model;
        float found[MOST_HEAD_DIM], logit = b.gate_bias[head];
        if (b.gate_weight) logit += line(b.gate_weight + (int64_t)head * d, x, d);
        feature(query);
        read(memory, query, found);
        const float gate = sigmoid(logit);
        for (int i = 0; i < width; ++i) out[i] += gate * (found[i] - out[i]);
    }

    // Take the block that begins at slot `first` into the memories of these rows. deepest: the most
    // loops that each of them runs.
    void fold(const int32_t* rows, const int32_t* deepest, int count, int first,
              const Cache& cache) {
        const Model& m = model;
        const int width = m.head_dim, half = width / 2, size = m.memory_block;
        const int64_t batch = cache.depth / cache.row, heads = cache.memories * m.kv_heads;
        backwards.resize((size_t)count * size * width);
        pool.each(count * size, 4, [&](int begin, int end) {
            for (int item = begin; item < end; ++item) {
                const int64_t slot = rows[item / size] * m.memory_window + first + item % size;
                float* table = backwards.data() + (int64_t)item * width;
                for (int i = 0; i < half; ++i) {
                    const int64_t axis = i % cache.axes * batch * m.memory_window;
                    const double angle = (double)cache.positions[axis + slot] * m.frequencies[i];
                    table[i] = (float)std::cos(angle), table[half + i] = (float)-std::sin(angle);
                }
            }
        });
        pool.each(count * m.core * (int)heads, 1, [&](int begin, int end) {
            for (int item = begin; item < end; ++item) {
                const int n = item / (int)heads / m.core, layer = item / (int)heads % m.core;
                const int64_t own = item % heads / m.kv_heads, head = item % m.kv_heads;
                int64_t depth = core_slot(deepest[n], cache);
                if (cache.memories > 1) depth = std::min(depth, own);
                const int64_t from = depth * cache.depth + rows[n] * cache.row +
                                     head * cache.head + (int64_t)first * width;
                const int64_t of_row = own * batch + rows[n];
                if (!head) cache.document[layer][of_row] = 0;
                write(m.blocks[m.prelude + layer], (int)head,
                      memory_of(cache, layer, of_row * m.kv_heads + head),
                      cache.keys[m.prelude + layer] + from, cache.values[m.prelude + layer] + from,
                      backwards.data() + (int64_t)n * size * width);
            }
        });
    }

    // Write a block's keys and values, (memory_block, head_dim), into a memory, token after token.
    // tables: that turn the keys back.
    void write(const Block& b, int head, const Memory& memory, const float* keys,
               const float* values, const float* tables) const {
        const int width = model.head_dim;
        thread_local std::vector<float> before;  // the block, for INFINI_DELTA
        Memory old{nullptr, nullptr};
        if (model.memory == INFINI_DELTA) {
            before.assign(memory.matrix, memory.matrix + (int64_t)width * width);
            before.insert(before.end(), memory.norm, memory.norm + width);
            old = {before.data(), before.data() + (int64_t)width * width};
        }
        float key[MOST_HEAD_DIM], value[MOST_HEAD_DIM];
        for (int t = 0; t < model.memory_block; ++t) {
            const int64_t at = (int64_t)t * width;
            memcpy(key, keys + at, width * sizeof(float));
            memcpy(value, values + at, width * sizeof(float));
            turn(key, nullptr, tables + at);
            if (model.memory == DELTA)
                replace(b, head, memory, key, value);
            else
                accumulate(memory, old, key, value);
        }
    }

    // The gated delta rule for a token; key and value are overwritten.
    void replace(const Block& b, int head, const Memory& memory, float* key, float* value) const {
        const int width = model.head_dim;
        const auto logit = [&](int which) {
            const int64_t row = which * model.kv_heads + head;
            const float* weight = b.write_weight + row * 2 * width;
            return line(weight, key, width) + line(weight + width, value, width) +
                   b.write_bias[row];
        };
        const float written = sigmoid(logit(0));
        const float kept = std::exp(-std::max(softplus(logit(1)) - FREE_DECAY, 0.0f));
        float found[MOST_HEAD_DIM];
        feature(key);
        read(memory, key, found);
        for (int i = 0; i < width; ++i) value[i] = written * (value[i] - kept * found[i]);
        add_outer(memory.matrix, kept, key, value);
    }

    // Infini-attention's sums for a token. old: what is taken off the value, or null.
    void accumulate(const Memory& memory, const Memory& old, float* key, float* value) const {
        const int width = model.head_dim;
        feature(key);
        if (old.matrix) {
            float found[MOST_HEAD_DIM];
            read(old, key, found);
            for (int i = 0; i < width; ++i) value[i] -= found[i];
        }
        add_outer(memory.matrix, 1, key, value);
        for (int i = 0; i < width; ++i) memory.norm[i] += key[i];
    }

    // matrix = kept * matrix + key value^T
    void add_outer(float* matrix, float kept, const float* key, const float* value) const {
        const int width = model.head_dim;
        for (int i = 0; i < width; ++i) {
            float* row = matrix + (int64_t)i * width;
            for (int j = 0; j < width; ++j) row[j] = kept * row[j] + key[i] * value[j];
        }
    }

    // ------------------------------------------------------------ stages

    void embed(const int64_t* tokens, float* at, const Rows& rows, const Cache& cache) {
        const Model& m = model;
        for (int r = 0; r < rows.count; ++r)
            memcpy(at + (int64_t)r * m.d_model, m.embedding + tokens[r] * m.d_model,
                   m.d_model * sizeof(float));
        find_turns(rows);
        if (m.memory) keep_positions(rows, cache);
        for (int layer = 0; layer < m.prelude; ++layer)
            block(layer, at, rows, cache, [](int) { return (int64_t)0; });
    }

    // Positions for the block's folding; text stands at the same place on every axis.
    void keep_positions(const Rows& rows, const Cache& cache) const {
        const int64_t ring = model.memory_window, axis = cache.depth / cache.row * ring;
        for (int r = 0; r < rows.count; ++r)
            for (int a = 0; a < cache.axes; ++a)
                cache.positions[a * axis + rows.row[r] * ring + slot_of(rows.column[r])] =
                    rows.position[r];
    }

    int64_t core_slot(int loop, const Cache& cache) const { return std::min(loop, cache.depths) - 1; }

    // at: the state, in place; loop: each row's first, counted from 1, of `passes`.
    void iterate(float* at, const float* words, const int32_t* loop, int passes, const Rows& rows,
                 const Cache& cache) {
        find_turns(rows);
        for (int more = 0; more < passes; ++more) step(at, words, loop, more, rows, cache);
    }

    // `iterate` until a row may stop; the number of passes. out: (count, 3), what `confidence` gives
    // after the last, the gain where a row's exit looks at it, and by how much that pass changed the
    // state.
    int until_exit(float* at, const float* words, const int32_t* loop, const StopCondition& stop,
                   const Rows& rows, const Cache& cache, float* out) {
        find_turns(rows);
        const int width = model.d_model;
        for (int more = 0;; ++more) {
            bool check = false, end = false;
            for (int r = 0; r < rows.count; ++r) {
                check |= loop[r] + more >= stop.first[r];
                end |= loop[r] + more >= stop.last[r];
            }
            if (check || end) memcpy(before.data(), at, sizeof(float) * rows.count * width);
            step(at, words, loop, more, rows, cache);
            if (!check && !end) continue;
            confidence(at, loop, more, rows.count, stop.odds, stop.gain, out, 3);
            for (int r = 0; r < rows.count; ++r) {
                float* output = out + 3 * r;
                output[2] = change(before.data() + (int64_t)r * width, at + (int64_t)r * width);
                end |= loop[r] + more >= stop.first[r] &&
                       ((stop.odds && output[0] >= stop.min_odds[r]) ||
                        (stop.gain && stop.nats(output, loop[r] + more) < stop.max_nats[r]));
            }
            if (!end) continue;
            if (!stop.odds) confidence(at, loop, more, rows.count, true, false, out, 3);
            return more + 1;
        }
    }

    // `relative_change`
    float change(const float* a, const float* b) const {
        float moved = 0, size = 0;
#pragma omp simd reduction(+ : moved, size)
        for (int i = 0; i < model.d_model; ++i) {
            moved += (b[i] - a[i]) * (b[i] - a[i]);
            size += b[i] * b[i];
        }
        return std::max(std::sqrt(moved) / std::max(std::sqrt(size), 1e-12f), 1e-6f);
    }

    // at: the states, and then what enters the core's first layer in the loops loop[r] + more.
    void inject(float* at, const float* words, const int32_t* loop, int more, int count) {
        const Model& m = model;
        if (m.injection == BRIDGE) return cross(at, words, loop, more, count);
        for (int r = 0; m.injection == NORM && r < count; ++r) {
            float* own = at + (int64_t)r * m.d_model;
            const float* first = words + (int64_t)r * m.d_model;
            if (loop[r] + more > 1) {
                rms_norm(own, m.state_norm, m.d_model, m.eps, normed.data());
                memcpy(own, normed.data(), m.d_model * sizeof(float));
            } else {
                for (int i = 0; i < m.d_model; ++i) own[i] = first[i] * m.embedding_scale[i];
            }
        }
        for (int r = 0; m.injection == HALF_STEPS && r < count; ++r) {
            float* own = at + (int64_t)r * m.d_model;
            const float* first = words + (int64_t)r * m.d_model;
            const bool later = loop[r] + more > 1;
            for (int i = 0; i < m.d_model; ++i) own[i] = later ? (first[i] + own[i]) / 2 : first[i];
        }
        for (int r = 0; m.injection == BY_CHANNEL && r < count; ++r) {
            float* own = at + (int64_t)r * m.d_model;
            float* mixed = normed.data();
            rms_norm(own, m.state_norm, m.d_model, m.eps, mixed);
            for (int i = 0; i < m.d_model; ++i) own[i] = mixed[i] * m.state_scale[i];
            rms_norm(words + (int64_t)r * m.d_model, m.embedding_norm, m.d_model, m.eps, mixed);
            for (int i = 0; i < m.d_model; ++i) own[i] += mixed[i] * m.embedding_scale[i];
        }
    }

    // `inject` by a bridge: words + bridge norm(state), and the words alone in the first loop.
    void cross(float* at, const float* words, const int32_t* loop, int more, int count) {
        const Model& m = model;
        const size_t row = m.d_model, bytes = row * sizeof(float);
        bool later = false;
        for (int r = 0; r < count; ++r) later |= loop[r] + more > 1;
        if (later) enter(at, m.state_norm, count, m.d_model, m.bridge.kind);
        memcpy(at, words, count * bytes);
        if (!later) return;
        add(m.bridge, at);
        for (int r = 0; r < count; ++r)
            if (loop[r] + more <= 1) memcpy(at + r * row, words + r * row, bytes);
    }

    void step(float* at, const float* words, const int32_t* loop, int more, const Rows& rows,
              const Cache& cache) {
        const Model& m = model;
        const bool halves = m.injection == HALF_STEPS;
        if (halves) memcpy(before.data(), at, sizeof(float) * rows.count * m.d_model);
        inject(at, words, loop, more, rows.count);
        for (int layer = 0; layer < m.core; ++layer)
            block(m.prelude + layer, at, rows, cache,
                  [&](int r) { return core_slot(loop[r] + more, cache); });
        for (int r = 0; halves && r < rows.count; ++r) {
            if (loop[r] + more <= 1) continue;
            const int64_t first = (int64_t)r * m.d_model;
            const float *state = before.data() + first, *word = words + first;
            float* own = at + first;
            for (int i = 0; i < m.d_model; ++i)
                own[i] = (state[i] + ((word[i] + state[i]) / 2 + own[i]) / 2) / 2;
        }
    }

    // at is overwritten; out: (count, vocab).
    void logits(float* at, float* out, const Rows& rows, const Cache& cache) {
        const Model& m = model;
        find_turns(rows);
        for (int layer = 0; layer < m.coda; ++layer)
            block(m.prelude + m.core + layer, at, rows, cache, [](int) { return (int64_t)0; });
        enter(at, m.norm, rows.count, m.d_model, m.head.kind);
        pool.each(m.vocab, unit_of(m.head), [&](int begin, int end) {
            product(m.head, begin, end, input, out, m.vocab);
        });
    }

    // Rows exit, each after its loop and with its state `at`. In the first core layer the slots of
    // deeper loops get what the next loop would have written, in the others what the last loop
    // wrote. Where loops share a slot, only the first layer's is written.
    void backfill(const float* at, const float* words, const int32_t* loop, const Rows& rows,
                  const Cache& cache) {
        const Model& m = model;
        const Block& b = m.blocks[m.prelude];
        const int n = rows.count, width = m.head_dim, kv = m.kv_heads * width;
        memcpy(before.data(), at, sizeof(float) * n * m.d_model);
        inject(before.data(), words, loop, 1, n);
        enter(before.data(), b.attention_norm, n, m.d_model, b.k.kind);
        project<2>({&b.k, &b.v}, qkv.data(), 2 * kv);
        shift(b.k_bias, kv, qkv.data(), 2 * kv, n);
        shift(b.v_bias, kv, qkv.data() + kv, 2 * kv, n);
        find_turns(rows);
        const bool shared = cache.depths == 1;
        for (int r = 0; r < n; ++r)
            for (int h = 0; h < m.kv_heads; ++h) {
                float* key = qkv.data() + (int64_t)r * 2 * kv + h * width;
                turn(key, b.k_norm, turns.data() + (int64_t)r * width);
                const int64_t to = rows.row[r] * cache.row + h * cache.head +
                                   (int64_t)slot_of(rows.column[r]) * width;
                for (int layer = 0; layer < (shared ? 1 : m.core); ++layer) {
                    float* keys = cache.keys[m.prelude + layer] + to;
                    float* values = cache.values[m.prelude + layer] + to;
                    const int64_t own = core_slot(loop[r], cache) * cache.depth;
                    const float* from_keys = layer ? keys + own : key;
                    const float* from_values = layer ? values + own : key + kv;
                    for (int deeper = shared ? 1 : loop[r] + 1; deeper <= cache.depths; ++deeper) {
                        const int64_t slot = core_slot(deeper, cache) * cache.depth;
                        memcpy(keys + slot, from_keys, width * sizeof(float));
                        memcpy(values + slot, from_values, width * sizeof(float));
                    }
                }
            }
    }

    // out: for each row, `stride` apart, the log-odds of being right and the nats of one more loop,
    // each where it is asked for.
    void confidence(const float* at, const int32_t* loop, int more, int count, bool odds, bool gain,
                    float* out, int stride) {
        const Model& m = model;
        const int width = m.confidence_hidden.rows;
        const int first = gain ? 0 : m.gain_units, last = odds ? width : m.gain_units;
        if (!odds && !gain) return;
        enter(at, m.confidence_norm, count, m.d_model, FLOAT);
        float* gates = judged.data() + (int64_t)count * width;
        pool.each(last - first, 4, [&](int begin, int end) {
            begin += first, end += first;
            product(m.confidence_hidden, begin, end, input, judged.data(), width);
            product(m.confidence_gate, begin, end, input, gates, width);
        });
        for (int r = 0; r < count; ++r) {
            float* own = judged.data() + (int64_t)r * width;
            const float* depth = m.confidence_loop + (int64_t)(std::min(loop[r] + more, m.max_loops) - 1) * width;
            for (int i = first; i < last; ++i) own[i] = gelu(own[i] + m.confidence_bias[i] + depth[i]);
            const float* gate = gates + (int64_t)r * width;
            for (int i = first; i < last; ++i) own[i] *= gate[i] + m.confidence_gate_bias[i];
            const int cut = m.gain_units;
            float* output = out + stride * r;
            if (odds) output[0] = m.confidence_out_bias[0] + line(own + cut, m.confidence_out + cut, width - cut);
            if (gain) output[1] = m.confidence_out_bias[1] + line(own, m.confidence_out, cut);
        }
    }
};

namespace {

// What a call returns in place of 0; the Python side has a sentence for each.
enum Error : int32_t { BAD_TOKEN = -1, BAD_PLACE = -2, BAD_LOOP = -3, NO_ROOM = -4, FAILED = -5 };

struct Refused {
    Error error;
};

// A call's work, with no exception that leaves through C: it would end the process.
template <class Work> int32_t guarded(Work&& work) {
    try {
        return work();
    } catch (const Refused& refused) {
        return refused.error;
    } catch (const std::bad_alloc&) {
        return NO_ROOM;
    } catch (...) {
        return FAILED;
    }
}

void check_ring(const Runner& r, int64_t capacity) {
    if (capacity != r.model.memory_window) throw Refused{BAD_PLACE};
}

// Nothing is read or written beyond the cache.
void check(const Runner& r, const Rows& rows, const Cache& cache) {
    const int64_t batch = cache.depth / std::max<int64_t>(cache.row, 1);
    const int64_t capacity = cache.head / r.model.head_dim;
    if (r.model.memory) check_ring(r, capacity);
    for (int n = 0; n < rows.count; ++n)
        if (rows.row[n] < 0 || rows.row[n] >= batch || rows.start[n] < 0 ||
            rows.start[n] > rows.column[n] || rows.position[n] < 0 ||
            (!r.model.memory && rows.column[n] >= capacity))
            throw Refused{BAD_PLACE};
}

void check_loops(const int32_t* loops, int count) {
    for (int n = 0; n < count; ++n)
        if (loops[n] < 1) throw Refused{BAD_LOOP};
}

}  // namespace

extern "C" {

Runner* looptx_new(const Model* model, int32_t threads) {
    Runner* made = nullptr;
    guarded([&] { return made = new Runner(*model, threads), 0; });
    return made;
}

// Whether matrices may be BFLOAT_TILES here.
int32_t looptx_has_tiles() { return has_tiles(); }

void looptx_free(Runner* runner) { delete runner; }

// The version of these structs and functions, and the structs' sizes in bytes.
void looptx_layout(int32_t* out) {
    const int32_t found[] = {LOOPTX_ABI_VERSION, sizeof(Matrix), sizeof(Block), sizeof(Model),
                             sizeof(Cache), sizeof(Rows), sizeof(StopCondition)};
    memcpy(out, found, sizeof(found));
}

int32_t looptx_embed(Runner* r, const int64_t* tokens, float* at, const Rows* rows,
                     const Cache* cache) {
    return guarded([&] {
        check(*r, *rows, *cache);
        for (int n = 0; n < rows->count; ++n)
            if (tokens[n] < 0 || tokens[n] >= r->model.vocab) throw Refused{BAD_TOKEN};
        r->make_room(rows->count);
        r->embed(tokens, at, *rows, *cache);
        return 0;
    });
}

int32_t looptx_iterate(Runner* r, float* at, const float* words, const int32_t* loop,
                       int32_t passes, const Rows* rows, const Cache* cache) {
    return guarded([&] {
        check(*r, *rows, *cache);
        check_loops(loop, rows->count);
        r->make_room(rows->count);
        r->iterate(at, words, loop, passes, *rows, *cache);
        return 0;
    });
}

int32_t looptx_until_exit(Runner* r, float* at, const float* words, const int32_t* loop,
                          const StopCondition* stop, const Rows* rows, const Cache* cache,
                          float* out) {
    return guarded([&] {
        check(*r, *rows, *cache);
        check_loops(loop, rows->count);
        r->make_room(rows->count);
        return (int)r->until_exit(at, words, loop, *stop, *rows, *cache, out);
    });
}

int32_t looptx_logits(Runner* r, float* at, float* out, const Rows* rows, const Cache* cache) {
    return guarded([&] {
        check(*r, *rows, *cache);
        r->make_room(rows->count);
        r->logits(at, out, *rows, *cache);
        return 0;
    });
}

int32_t looptx_backfill(Runner* r, const float* at, const float* words, const int32_t* loops,
                        const Rows* rows, const Cache* cache) {
    return guarded([&] {
        check(*r, *rows, *cache);
        check_loops(loops, rows->count);
        r->make_room(rows->count);
        r->backfill(at, words, loops, *rows, *cache);
        return 0;
    });
}

int32_t looptx_fold(Runner* r, const int32_t* rows, const int32_t* deepest, int32_t count,
                    int32_t first, const Cache* cache) {
    return guarded([&] {
        const int64_t batch = cache->depth / std::max<int64_t>(cache->row, 1);
        check_ring(*r, cache->head / r->model.head_dim);
        check_loops(deepest, count);
        for (int n = 0; n < count; ++n)
            if (rows[n] < 0 || rows[n] >= batch) throw Refused{BAD_PLACE};
        if (first < 0 || first + r->model.memory_block > r->model.memory_window)
            throw Refused{BAD_PLACE};
        r->fold(rows, deepest, count, first, *cache);
        return 0;
    });
}

int32_t looptx_confidence(Runner* r, const float* at, const int32_t* loops, int32_t count,
                          float* out) {
    return guarded([&] {
        check_loops(loops, count);
        r->make_room(count);
        r->confidence(at, loops, 0, count, true, true, out, 2);
        return 0;
    });
}

}  // extern "C"
