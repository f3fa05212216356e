// What torch lacks on a CPU: paged attention, fused norms, rotary + cache write, SwiGLU.
//
// The promise: what is computed for a row depends on that row (and, in attention, the keys and
// values before it) alone, to the bit. Hence the rules of this file:
//   * One piece of code per row. Remainders go through the same vector code, padded with zeros.
//   * Sums run in an order fixed by the row's own coordinates: channels in order, 16 partial sums
//     per row, positions in order, in tiles cut at absolute multiples of TILE. How many rows share
//     a register block, a tile of queries or a thread never changes a row's operations.
//   * No -ffast-math. Products and sums fuse alike in every instantiation of a template; the
//     identity test would show a compiler that does otherwise.
// Arithmetic is float32; inputs and outputs are float32, bfloat16 or float16, rounded to nearest even.
// How 16 of them are loaded, stored and computed with: vectors.h.
//
// Shape letters as in ops.py: N tokens, H query heads, G key/value heads, D channels of a head,
// T tokens of a block, R runs, B blocks of a table.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include <omp.h>
#include <sched.h>

#include "vectors.h"

namespace {

constexpr int TILE = 64;          // positions attended at once
constexpr int GROUPS = TILE / LANES;
constexpr int ROWS = 6;           // query rows of a register block: 6 x 4 sums of 16 lanes
constexpr int QUERY_ROWS = 96;    // query rows (tokens x heads of a group) of one task
constexpr int64_t SMALL = 1 << 14;  // elements below which a second thread costs more than it saves

// ── norms, SwiGLU, rotary ───────────────────────────────────────────────────────────────────────

template <class T> void norm_row(const T* x, const T* weight, T* out, int64_t channels, float eps) {
    Vec squares = all(0.0f);
    for (int64_t c = 0; c < channels; c += LANES) {
        const Vec part = load_at(x, c, channels);
        squares += part * part;
    }
    const float scale = 1.0f / std::sqrt(sum_of(squares) / (float)channels + eps);
    for (int64_t c = 0; c < channels; c += LANES)
        store_at(out, c, channels, load_at(x, c, channels) * scale * load_at(weight, c, channels));
}

template <class T>
void rms_norm(const T* x, int64_t x_stride, const T* weight, T* out, int64_t rows, int64_t channels,
              float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * channels > SMALL)
    for (int64_t row = 0; row < rows; ++row)
        norm_row(x + row * x_stride, weight, out + row * channels, channels, eps);
}

template <class T>
void add_rms_norm(const T* x, const T* residual, const T* weight, T* out, T* residual_out,
                  int64_t rows, int64_t channels, float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * channels > SMALL)
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t at = row * channels;
        for (int64_t c = 0; c < channels; c += LANES)
            store_at(residual_out + at, c, channels,
                     load_at(x + at, c, channels) + load_at(residual + at, c, channels));
        norm_row(residual_out + at, weight, out + at, channels, eps);
    }
}

template <class T>
void silu_mul(const T* gate_up, T* out, int64_t rows, int64_t channels, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * channels > SMALL)
    for (int64_t row = 0; row < rows; ++row) {
        const T* gate = gate_up + row * 2 * channels;
        for (int64_t c = 0; c < channels; c += LANES) {
            const Vec g = load_at(gate, c, channels);
            const Vec u = load_at(gate + channels, c, channels);
            store_at(out + row * channels, c, channels, g / (exp_of(-g) + 1.0f) * u);
        }
    }
}

// One head: channel i turns with channel i + half.
template <class T> void turn(const T* x, const float* rope, T* out, int64_t half) {
    for (int64_t i = 0; i < half; i += LANES) {
        const Vec cosine = load_at(rope, i, half), sine = load_at(rope + half, i, half);
        const Vec first = load_at(x, i, half), second = load_at(x + half, i, half);
        store_at(out, i, half, first * cosine - second * sine);
        store_at(out + half, i, half, second * cosine + first * sine);
    }
}

struct Cache {
    int64_t block_stride;  // elements from one block to the next: L * 2 * G * T * D
    int64_t offset;        // elements from a block's start to the layer's keys: layer * 2 * G * T * D
    int64_t block_tokens, kv_heads, head_dim;

    // Elements from the pool's start to the key of one token in one head; int64 since a pool of
    // 2^31 elements is only 4 GiB of bfloat16.
    int64_t key(int64_t block, int64_t head, int64_t token) const {
        return block * block_stride + offset + (head * block_tokens + token) * head_dim;
    }
    int64_t to_values() const { return kv_heads * block_tokens * head_dim; }
};

template <class T>
void rope_and_cache(const T* q, int64_t q_stride, const T* k, int64_t k_stride, const T* v,
                    int64_t v_stride, const float* rope, const int64_t* positions,
                    const int64_t* slots, T* q_out, T* pool, Cache cache, int64_t tokens,
                    int64_t heads, int threads) {
    const int64_t dim = cache.head_dim;
#pragma omp parallel for num_threads(threads) if (tokens * heads * dim > SMALL)
    for (int64_t n = 0; n < tokens; ++n) {
        const float* angles = rope + positions[n] * dim;
        for (int64_t h = 0; h < heads; ++h)
            turn(q + n * q_stride + h * dim, angles, q_out + (n * heads + h) * dim, dim / 2);
        const int64_t block = slots[n] / cache.block_tokens, token = slots[n] % cache.block_tokens;
        for (int64_t g = 0; g < cache.kv_heads; ++g) {
            T* key = pool + cache.key(block, g, token);
            turn(k + n * k_stride + g * dim, angles, key, dim / 2);
            std::memcpy(key + cache.to_values(), v + n * v_stride + g * dim, dim * sizeof(T));
        }
    }
}

// ── attention ───────────────────────────────────────────────────────────────────────────────────
//
// A task is a stretch of one run's queries for one key/value head: up to QUERY_ROWS rows, a row
// being one query token in one of the group's heads, tokens in order. For each tile of positions,
// keys are turned into [D, TILE] and values into [TILE, D], both float32, once for all rows; then
// register blocks of up to ROWS rows go through scores, online softmax and the sum of values.

// Rows of 16 x 16 become columns. Interleaving row i with row i + 8 rotates the eight bits of
// (row, column) by one; four times exchanges row and column.
inline void transpose(Vec rows[LANES]) {
    const Int low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    const Int high = low + 8;
    for (int round = 0; round < 4; ++round) {
        Vec next[LANES];
        for (int i = 0; i < LANES / 2; ++i) {
            next[2 * i] = __builtin_shuffle(rows[i], rows[i + LANES / 2], low);
            next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + LANES / 2], high);
        }
        for (int i = 0; i < LANES; ++i) rows[i] = next[i];
    }
}

struct Scratch {
    std::vector<Vec> keys;    // [dim_padded, GROUPS]
    std::vector<Vec> values;  // [TILE, dim_vectors]
    std::vector<Vec> queries; // [QUERY_ROWS, dim_vectors], scaled
    std::vector<Vec> sums;    // [QUERY_ROWS, dim_vectors]
    std::vector<Vec> totals;  // [QUERY_ROWS]: 16 partial sums of the softmax's denominator
    std::vector<float> best;  // [QUERY_ROWS]: the largest score so far
};

// The keys and values of positions first..first + count of one run and head; zeros behind them.
template <class T>
void fill_tile(Scratch& scratch, const T* pool, const Cache& cache, const int32_t* table,
               int64_t head, int64_t first, int count, int dim_vectors) {
    const int64_t dim = cache.head_dim;
    const T* keys[TILE];
    for (int j = 0; j < count; ++j) {
        const int64_t position = first + j;
        keys[j] = pool + cache.key(table[position / cache.block_tokens], head,
                                   position % cache.block_tokens);
    }
    for (int j = 0; j < TILE; ++j)
        for (int c = 0; c < dim_vectors; ++c)
            scratch.values[j * dim_vectors + c] =
                j < count ? load_at(keys[j] + cache.to_values(), c * LANES, dim) : all(0.0f);
    for (int group = 0; group < GROUPS; ++group)
        for (int c = 0; c < dim_vectors; ++c) {
            Vec square[LANES];
            for (int i = 0; i < LANES; ++i) {
                const int j = group * LANES + i;
                square[i] = j < count ? load_at(keys[j], c * LANES, dim) : all(0.0f);
            }
            transpose(square);
            for (int i = 0; i < LANES; ++i)
                scratch.keys[(c * LANES + i) * GROUPS + group] = square[i];
        }
}

// sums[row][c..c + WIDTH) = sums * factor + the tile's values, weighted; positions in order.
template <int COUNT, int WIDTH>
inline void add_values(Scratch& scratch, int row, int c, int dim_vectors, const float* weights,
                       const float* factor, int positions) {
    Vec sum[COUNT][WIDTH];
    for (int r = 0; r < COUNT; ++r)
        for (int w = 0; w < WIDTH; ++w)
            sum[r][w] = scratch.sums[(row + r) * dim_vectors + c + w] * factor[r];
    for (int j = 0; j < positions; ++j) {
        const Vec* value = &scratch.values[j * dim_vectors + c];
        for (int r = 0; r < COUNT; ++r)
            for (int w = 0; w < WIDTH; ++w) sum[r][w] += value[w] * weights[r * TILE + j];
    }
    for (int r = 0; r < COUNT; ++r)
        for (int w = 0; w < WIDTH; ++w)
            scratch.sums[(row + r) * dim_vectors + c + w] = sum[r][w];
}

// One register block against one tile. visible[r]: how many of the tile's positions row r sees.
template <int COUNT>
void attend_block(Scratch& scratch, int row, int dim_vectors, const int* visible) {
    Vec score[COUNT][GROUPS];
    for (int r = 0; r < COUNT; ++r)
        for (int g = 0; g < GROUPS; ++g) score[r][g] = all(0.0f);
    const float* query = (const float*)&scratch.queries[row * dim_vectors];
    const int dim = dim_vectors * LANES;
    for (int d = 0; d < dim; ++d) {
        const Vec* key = &scratch.keys[d * GROUPS];
        for (int r = 0; r < COUNT; ++r)
            for (int g = 0; g < GROUPS; ++g) score[r][g] += key[g] * query[r * dim + d];
    }
    const Int lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    float weights[COUNT * TILE] __attribute__((aligned(64)));
    float factor[LANES] __attribute__((aligned(64))) = {};
    float best[COUNT];
    int positions = 0;
    for (int r = 0; r < COUNT; ++r) {
        positions = std::max(positions, visible[r]);
        for (int g = 0; g < GROUPS; ++g)
            score[r][g] = lane + g * LANES < visible[r] ? score[r][g] : all(-INFINITY);
        const Vec pairs = larger(larger(score[r][0], score[r][1]), larger(score[r][2], score[r][3]));
        best[r] = std::max(scratch.best[row + r], max_of(pairs));
        factor[r] = scratch.best[row + r] - best[r];
        scratch.best[row + r] = best[r];
    }
    store(factor, exp_of(load(factor)));
    for (int r = 0; r < COUNT; ++r) {
        Vec part[GROUPS];
        for (int g = 0; g < GROUPS; ++g) {
            part[g] = exp_of(score[r][g] - best[r]);
            store(weights + r * TILE + g * LANES, part[g]);
        }
        scratch.totals[row + r] =
            scratch.totals[row + r] * factor[r] + ((part[0] + part[1]) + (part[2] + part[3]));
    }
    int c = 0;
    for (; c + 4 <= dim_vectors; c += 4)
        add_values<COUNT, 4>(scratch, row, c, dim_vectors, weights, factor, positions);
    for (; c < dim_vectors; ++c)
        add_values<COUNT, 1>(scratch, row, c, dim_vectors, weights, factor, positions);
}

void attend(Scratch& scratch, int row, int count, int dim_vectors, const int* visible) {
    switch (count) {
        case 1: return attend_block<1>(scratch, row, dim_vectors, visible);
        case 2: return attend_block<2>(scratch, row, dim_vectors, visible);
        case 3: return attend_block<3>(scratch, row, dim_vectors, visible);
        case 4: return attend_block<4>(scratch, row, dim_vectors, visible);
        case 5: return attend_block<5>(scratch, row, dim_vectors, visible);
        default: return attend_block<ROWS>(scratch, row, dim_vectors, visible);
    }
}

struct Task {
    int64_t token;      // the first query, in the packed batch
    int64_t position;   // of that query, in its sequence
    int count;          // queries
    const int32_t* table;
};

template <class T>
void attend_task(Scratch& scratch, const Task& task, int64_t head, const T* q, const T* pool,
                 T* out, const Cache& cache, int64_t heads, float scale) {
    const int64_t dim = cache.head_dim, group = heads / cache.kv_heads;
    const int dim_vectors = (int)((dim + LANES - 1) / LANES);
    const int rows = task.count * (int)group;
    scratch.keys.resize(dim_vectors * LANES * GROUPS);
    scratch.values.resize(TILE * dim_vectors);
    scratch.queries.resize(rows * dim_vectors);
    scratch.sums.assign(rows * dim_vectors, all(0.0f));
    scratch.totals.assign(rows, all(0.0f));
    scratch.best.assign(rows, -INFINITY);
    const auto at = [&](int row) {  // of one row's query and output
        return ((task.token + row / group) * heads + head * group + row % group) * dim;
    };
    for (int row = 0; row < rows; ++row)
        for (int c = 0; c < dim_vectors; ++c)
            scratch.queries[row * dim_vectors + c] = load_at(q + at(row), c * LANES, dim) * scale;

    const int64_t end = task.position + task.count;  // positions that some row sees
    for (int64_t first = 0; first < end; first += TILE) {
        fill_tile(scratch, pool, cache, task.table, head, first,
                  (int)std::min<int64_t>(TILE, end - first), dim_vectors);
        // Rows whose token comes before this tile are done.
        const int skipped = (int)(std::max<int64_t>(0, first - task.position) * group);
        for (int row = skipped; row < rows; row += ROWS) {
            const int count = std::min(ROWS, rows - row);
            int visible[ROWS];
            for (int r = 0; r < count; ++r)
                visible[r] = (int)std::min<int64_t>(
                    TILE, task.position + (row + r) / group - first + 1);
            attend(scratch, row, count, dim_vectors, visible);
        }
    }
    for (int row = 0; row < rows; ++row) {
        const float inverse = 1.0f / sum_of(scratch.totals[row]);
        for (int c = 0; c < dim_vectors; ++c)
            store_at(out + at(row), c * LANES, dim,
                     scratch.sums[row * dim_vectors + c] * inverse);
    }
}

template <class T>
void attention(const T* q, const T* pool, T* out, const int64_t* positions, const int32_t* starts,
               const int32_t* tables, int64_t table_blocks, int64_t runs, Cache cache,
               int64_t heads, float scale, int threads) {
    const int queries = std::max<int>(1, QUERY_ROWS / (int)(heads / cache.kv_heads));
    std::vector<Task> tasks;
    for (int64_t run = 0; run < runs; ++run)
        for (int64_t token = starts[run]; token < starts[run + 1]; token += queries)
            tasks.push_back({token, positions[token],
                             (int)std::min<int64_t>(queries, starts[run + 1] - token),
                             tables + run * table_blocks});
    // The longest first, so that no thread is left with one when all others are done.
    std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) {
        return (a.position + a.count) * a.count > (b.position + b.count) * b.count;
    });
    const int64_t pieces = (int64_t)tasks.size() * cache.kv_heads;
#pragma omp parallel num_threads(threads) if (pieces > 1)
    {
        static thread_local Scratch scratch;
#pragma omp for schedule(dynamic, 1)
        for (int64_t piece = 0; piece < pieces; ++piece)
            attend_task(scratch, tasks[piece / cache.kv_heads], piece % cache.kv_heads, q, pool, out,
                        cache, heads, scale);
    }
}

template <class F> void with_type(int type, F run) {
    if (type == 0) run((float*)nullptr);
    else if (type == 1) run((bfloat16*)nullptr);
    else run((float16*)nullptr);
}

}  // namespace

// ── what library.py calls; `type` is 0 float32, 1 bfloat16, 2 float16 ───────────────────────────

extern "C" {

// Thread i of the caller's team runs on cores[i] alone from now on; how many could not be bound.
int pdserve_bind_threads(const int* cores, int threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(+ : failed)
    {
        cpu_set_t own;
        CPU_ZERO(&own);
        CPU_SET(cores[omp_get_thread_num()], &own);
        failed += sched_setaffinity(0, sizeof own, &own) != 0;
    }
    return failed;
}

void pdserve_rms_norm(int type, const void* x, int64_t x_stride, const void* weight, void* out,
                      int64_t rows, int64_t channels, float eps, int threads) {
    with_type(type, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        rms_norm((const T*)x, x_stride, (const T*)weight, (T*)out, rows, channels, eps, threads);
    });
}

void pdserve_add_rms_norm(int type, const void* x, const void* residual, const void* weight,
                          void* out, void* residual_out, int64_t rows, int64_t channels, float eps,
                          int threads) {
    with_type(type, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        add_rms_norm((const T*)x, (const T*)residual, (const T*)weight, (T*)out, (T*)residual_out,
                     rows, channels, eps, threads);
    });
}

void pdserve_silu_mul(int type, const void* gate_up, void* out, int64_t rows, int64_t channels,
                      int threads) {
    with_type(type, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        silu_mul((const T*)gate_up, (T*)out, rows, channels, threads);
    });
}

void pdserve_rope_and_cache(int type, const void* q, int64_t q_stride, const void* k,
                            int64_t k_stride, const void* v, int64_t v_stride, const float* rope,
                            const int64_t* positions, const int64_t* slots, void* q_out, void* pool,
                            int64_t block_stride, int64_t offset, int64_t block_tokens,
                            int64_t kv_heads, int64_t head_dim, int64_t tokens, int64_t heads,
                            int threads) {
    const Cache cache{block_stride, offset, block_tokens, kv_heads, head_dim};
    with_type(type, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        rope_and_cache((const T*)q, q_stride, (const T*)k, k_stride, (const T*)v, v_stride, rope,
                       positions, slots, (T*)q_out, (T*)pool, cache, tokens, heads, threads);
    });
}

void pdserve_attention(int type, const void* q, const void* pool, void* out,
                       const int64_t* positions, const int32_t* starts, const int32_t* tables,
                       int64_t table_blocks, int64_t runs, int64_t block_stride, int64_t offset,
                       int64_t block_tokens, int64_t kv_heads, int64_t head_dim, int64_t heads,
                       float scale, int threads) {
    const Cache cache{block_stride, offset, block_tokens, kv_heads, head_dim};
    with_type(type, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        attention((const T*)q, (const T*)pool, (T*)out, positions, starts, tables, table_blocks,
                  runs, cache, heads, scale, threads);
    });
}
}
