// Paged attention over packed runs: prompts, chunks and single tokens by the same code.
//
// A task is a stretch of one run's queries for one key/value head: up to QUERY_ROWS rows, a row
// being one query token in one of the group's heads, tokens in order. For each tile of positions,
// keys are turned into [D, TILE] and values into [TILE, D], packed as products.h has them, once for
// all rows; then register blocks of up to ROWS rows go through scores, online softmax and the sum
// of values. (The online softmax is FlashAttention's, Dao et al. 2022, section 3.1.)
//
// Where the pool holds codes (codec.h), they are what is multiplied: they are exact in every type.
// A position's scale is that of its score, and of its weight once that has been added to the total.
//
// A *window* hides all but the last so many positions from a query, its own included. A row goes
// through the tiles it sees something of and through no others, whatever its neighbours see.

#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include <omp.h>

#include "codec.h"
#include "pool.h"
#include "products.h"

namespace {

constexpr int TILE = 64;          // positions attended at once
constexpr int GROUPS = TILE / LANES;
constexpr int ROWS = 6;           // query rows of a register block: 6 x 4 sums of 16 lanes
constexpr int QUERY_ROWS = 96;    // query rows (tokens x heads of a group) of one task
constexpr float LOG2_E = 1.44269504f;  // scores are taken times this, so that 2^x does for e^x

// Rows of 16 x 16 become columns. Interleaving row i with row i + 8 rotates the eight bits of
// (row, column) by one; four times exchanges row and column.
template <class V> void transpose(V rows[LANES]) {
    const Int low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    const Int high = low + 8;
    for (int round = 0; round < 4; ++round) {
        V next[LANES];
        for (int i = 0; i < LANES / 2; ++i) {
            next[2 * i] = __builtin_shuffle(rows[i], rows[i + LANES / 2], low);
            next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + LANES / 2], high);
        }
        for (int i = 0; i < LANES; ++i) rows[i] = next[i];
    }
}

struct Task {
    int64_t token;      // the first query, in the packed batch
    int64_t position;   // of that query, in its sequence
    int count;          // queries
    const int32_t* table;
};

// Where the scales of a tile's codes lie, those of the keys; elsewhere there are none.
template <class E> struct Scales {};
template <> struct Scales<int8> {
    const int8* scales[TILE];
};

// Where a tile's keys and values lie; null before the first position that is seen, and behind the last.
template <class E> struct Where : Scales<E> {
    const E* keys[TILE] = {};
    const E* values[TILE] = {};

    Where(const E* pool, const Cache& cache, const int32_t* table, int64_t head, int64_t first,
          int64_t begin, int64_t end) {
        int64_t block = first / cache.block_tokens, token = first % cache.block_tokens;
        for (int j = 0; j < TILE && first + j < end; ++j) {
            if (first + j >= begin) {
                keys[j] = pool + cache.key(table[block], head, token);
                values[j] = keys[j] + cache.to_values();
                if constexpr (std::is_same_v<E, int8>)
                    this->scales[j] = pool + cache.scale(table[block], head, token);
            }
            if (++token == cache.block_tokens) token = 0, ++block;
        }
    }

    // Position j, to be in the cache when it is needed: blocks are too short for the CPU to guess.
    void fetch(int j, int64_t dim) const {
        if (j >= TILE || !keys[j]) return;
        for (int64_t at = 0; at < dim; at += LINE / (int64_t)sizeof(E)) {
            __builtin_prefetch(keys[j] + at);
            __builtin_prefetch(values[j] + at);
        }
    }
};

// What a thread computes a task in. E is what the pool is made of: T, or codes.
template <class T, class E> class Attending {
    static constexpr bool CODED = !std::is_same_v<T, E>;
    typedef Products<T> P;
    static constexpr int PACK = P::PACK;
    typedef typename P::Element Element;
    typedef typename P::Elements Elements;

  public:
    void run(const Task& task, int64_t head, const T* q, const E* pool, T* out, const Cache& cache,
             int64_t heads, float scale, int64_t window) {
        const int64_t dim = cache.head_dim, group = heads / cache.kv_heads;
        const int rows = task.count * (int)group;
        _scale = scale * LOG2_E;
        _dim_vectors = (int)((dim + LANES - 1) / LANES);
        _packs = (int)((dim + PACK * LANES - 1) / (PACK * LANES));
        _keys.resize(_packs * LANES * GROUPS);
        _values.resize(TILE / PACK * _dim_vectors);
        _queries.resize(rows * _packs);
        _sums.assign(rows * _dim_vectors, all(0.0f));
        _totals.assign(rows, all(0.0f));
        _best.assign(rows, -INFINITY);
        const auto at = [&](int row) {  // of one row's query and output
            return ((task.token + row / group) * heads + head * group + row % group) * dim;
        };
        for (int row = 0; row < rows; ++row)
            for (int c = 0; c < _packs; ++c)
                _queries[row * _packs + c] = P::along(q + at(row), c * PACK * LANES, dim);

        // Positions that some row sees.
        const int64_t begin = std::max<int64_t>(0, task.position - window + 1);
        const int64_t end = task.position + task.count;
        int64_t first = begin / TILE * TILE;
        Where<E> tile(pool, cache, task.table, head, first, begin, end);
        for (; first < end; first += TILE) {
            fill(tile, dim);
            if constexpr (CODED) fill_scales(tile, cache.to_values());
            tile = Where<E>(pool, cache, task.table, head, first + TILE, begin, end);
            // Rows whose token comes before this tile are done; those whose window begins after it
            // have their turn later.
            const int done = (int)(std::max<int64_t>(0, first - task.position) * group);
            const int last = (int)(std::min<int64_t>(
                task.count, first + TILE + window - 1 - task.position) * group);
            const int ahead = (TILE * ROWS + last - done - 1) / (last - done);
            int fetched = 0;
            for (int row = done; row < last; row += ROWS) {
                const int count = std::min(ROWS, last - row);
                int seen[ROWS], hidden[ROWS];
                for (int r = 0; r < count; ++r) {
                    const int64_t position = task.position + (row + r) / group - first;
                    seen[r] = (int)std::min<int64_t>(TILE, position + 1);
                    hidden[r] = (int)std::max<int64_t>(0, position - window + 1);
                }
                for (int i = 0; i < ahead; ++i) tile.fetch(fetched++, dim);
                attend(row, count, seen, hidden);
            }
        }
        for (int row = 0; row < rows; ++row) {
            const float inverse = 1.0f / sum_of(_totals[row]);
            for (int c = 0; c < _dim_vectors; ++c)
                store_at(out + at(row), c * LANES, dim, _sums[row * _dim_vectors + c] * inverse);
        }
    }

  private:
    // Codes are first written out as what they are, for the same code to go on with.
    void fill(const Where<E>& tile, int64_t dim) {
        if constexpr (CODED) {
            const T *keys[TILE] = {}, *values[TILE] = {};
            _numbers.resize(2 * TILE * dim);
            for (int j = 0; j < TILE; ++j) {
                if (!tile.keys[j]) continue;
                T* key = _numbers.data() + 2 * j * dim;
                decode(tile.keys[j], key, dim);
                decode(tile.values[j], key + dim, dim);
                keys[j] = key;
                values[j] = key + dim;
            }
            fill(keys, values, dim);
        } else {
            fill(tile.keys, tile.values, dim);
        }
    }

    // The keys and values of a tile; zeros where there are none.
    void fill(const T* const* keys, const T* const* values, int64_t dim) {
        for (int j = 0; j < TILE; j += PACK)
            for (int c = 0; c < _dim_vectors; ++c)
                _values[j / PACK * _dim_vectors + c] = P::across(values + j, c * LANES, dim);
        for (int group = 0; group < GROUPS; ++group)
            for (int c = 0; c < _packs; ++c) {
                Elements square[LANES];
                for (int i = 0; i < LANES; ++i) {
                    const T* key = keys[group * LANES + i];
                    square[i] = key ? P::along(key, c * PACK * LANES, dim) : Elements{};
                }
                transpose(square);
                for (int i = 0; i < LANES; ++i)
                    _keys[(c * LANES + i) * GROUPS + group] = square[i];
            }
    }

    void fill_scales(const Where<E>& tile, int64_t to_values) {
        for (int g = 0; g < GROUPS; ++g) {
            const E* const* key = tile.keys + g * LANES;
            const int8* const* scale = tile.scales + g * LANES;
            bfloat16 keys[LANES] = {}, values[LANES] = {};
            if (key[0] && key[LANES - 1] && scale[LANES - 1] == scale[0] + (LANES - 1) * 2) {
                std::memcpy(keys, scale[0], sizeof keys);  // in one block, as most are
                std::memcpy(values, scale[0] + to_values, sizeof values);
            } else {
                for (int i = 0; i < LANES; ++i)
                    if (key[i]) {
                        std::memcpy(keys + i, scale[i], sizeof *keys);
                        std::memcpy(values + i, scale[i] + to_values, sizeof *values);
                    }
            }
            _key_scales[g] = load(keys) * _scale;
            _value_scales[g] = load(values);
        }
    }

    void attend(int row, int count, const int* seen, const int* hidden) {
        switch (count) {
            case 1: return attend_block<1>(row, seen, hidden);
            case 2: return attend_block<2>(row, seen, hidden);
            case 3: return attend_block<3>(row, seen, hidden);
            case 4: return attend_block<4>(row, seen, hidden);
            case 5: return attend_block<5>(row, seen, hidden);
            default: return attend_block<ROWS>(row, seen, hidden);
        }
    }

    // What nobody in the register block sees is left out by 16 positions at a time, which adds the
    // same zeros to nothing: half of the tiles in which queries stand is before them.
    template <int COUNT> void attend_block(int row, const int* seen, const int* hidden) {
        switch ((*std::max_element(seen, seen + COUNT) + LANES - 1) / LANES) {
            case 1: return attend_groups<COUNT, 1>(row, seen, hidden);
            case 2: return attend_groups<COUNT, 2>(row, seen, hidden);
            case 3: return attend_groups<COUNT, 3>(row, seen, hidden);
            default: return attend_groups<COUNT, GROUPS>(row, seen, hidden);
        }
    }

    // One register block against the first SEEN groups of a tile. Row r sees the tile's positions
    // hidden[r] to seen[r] - 1; at least one.
    template <int COUNT, int SEEN>
    void attend_groups(int row, const int* seen, const int* hidden) {
        Vec score[COUNT][GROUPS];
        for (int r = 0; r < COUNT; ++r) {
            for (int g = 0; g < SEEN; ++g) score[r][g] = all(0.0f);
            for (int g = SEEN; g < GROUPS; ++g) score[r][g] = all(-INFINITY);
        }
        const int steps = _packs * LANES;
        const Element* query = (const Element*)&_queries[row * _packs];
        for (int d = 0; d < steps; ++d) {
            const Elements* key = &_keys[d * GROUPS];
            for (int r = 0; r < COUNT; ++r)
                for (int g = 0; g < SEEN; ++g)
                    score[r][g] = P::add(score[r][g], key[g], query[r * steps + d]);
        }
        Element weights[COUNT * TILE / PACK] __attribute__((aligned(64)));
        float factor[LANES] __attribute__((aligned(64))) = {};
        float best[COUNT];
        int positions = 0;
        for (int r = 0; r < COUNT; ++r) {
            positions = std::max(positions, seen[r]);
            const Bits count = Bits{} + (uint32_t)(seen[r] - hidden[r]);
            for (int g = 0; g < SEEN; ++g)  // unsigned: what is before `hidden` is a large number
                score[r][g] = (Bits)(LANE + (g * LANES - hidden[r])) < count
                                  ? score[r][g] * (CODED ? _key_scales[g] : all(_scale))
                                  : all(-INFINITY);
            const Vec pairs =
                larger(larger(score[r][0], score[r][1]), larger(score[r][2], score[r][3]));
            best[r] = std::max(_best[row + r], max_of(pairs));
            factor[r] = _best[row + r] - best[r];
            _best[row + r] = best[r];
        }
        store(factor, exp2_of(load(factor)));
        for (int r = 0; r < COUNT; ++r) {
            Vec part[GROUPS] = {};
            for (int g = 0; g < SEEN; ++g) {
                part[g] = exp2_of(score[r][g] - best[r]);
                P::narrow(CODED ? part[g] * _value_scales[g] : part[g],
                          weights + (r * TILE + g * LANES) / PACK);
            }
            _totals[row + r] =
                _totals[row + r] * factor[r] + ((part[0] + part[1]) + (part[2] + part[3]));
        }
        const int steps_of_values = (positions + PACK - 1) / PACK;
        int c = 0;
        for (; c + 4 <= _dim_vectors; c += 4)
            add_values<COUNT, 4>(row, c, weights, factor, steps_of_values);
        for (; c < _dim_vectors; ++c)
            add_values<COUNT, 1>(row, c, weights, factor, steps_of_values);
    }

    // sums[row][c..c + WIDTH) = sums * factor + the tile's values, weighted; positions in order.
    template <int COUNT, int WIDTH>
    void add_values(int row, int c, const Element* weights, const float* factor, int steps) {
        Vec sum[COUNT][WIDTH];
        for (int r = 0; r < COUNT; ++r)
            for (int w = 0; w < WIDTH; ++w)
                sum[r][w] = _sums[(row + r) * _dim_vectors + c + w] * factor[r];
        for (int j = 0; j < steps; ++j) {
            const Elements* value = &_values[j * _dim_vectors + c];
            for (int r = 0; r < COUNT; ++r)
                for (int w = 0; w < WIDTH; ++w)
                    sum[r][w] = P::add(sum[r][w], value[w], weights[r * TILE / PACK + j]);
        }
        for (int r = 0; r < COUNT; ++r)
            for (int w = 0; w < WIDTH; ++w)
                _sums[(row + r) * _dim_vectors + c + w] = sum[r][w];
    }

    float _scale;
    Vec _key_scales[GROUPS], _value_scales[GROUPS];  // of the tile's positions, where it has codes
    int _dim_vectors;                // of 16 channels
    int _packs;                      // of PACK * 16 channels
    std::vector<T> _numbers;         // [TILE, 2, dim]: where the pool has codes
    std::vector<Elements> _keys;     // [packs * 16, GROUPS]
    std::vector<Elements> _values;   // [TILE / PACK, dim_vectors]
    std::vector<Elements> _queries;  // [QUERY_ROWS, packs]
    std::vector<Vec> _sums;          // [QUERY_ROWS, dim_vectors]
    std::vector<Vec> _totals;        // [QUERY_ROWS]: 16 partial sums of the softmax's denominator
    std::vector<float> _best;        // [QUERY_ROWS]: the largest score so far
};

template <class T, class E>
void attention(const T* q, const E* pool, T* out, const int64_t* positions, const int32_t* starts,
               const int32_t* tables, int64_t table_blocks, int64_t runs, Cache cache,
               int64_t heads, float scale, int64_t window, int threads) {
    const int queries = std::max<int>(1, QUERY_ROWS / (int)(heads / cache.kv_heads));
    std::vector<Task> tasks;
    for (int64_t run = 0; run < runs; ++run)
        for (int64_t token = starts[run]; token < starts[run + 1]; token += queries)
            tasks.push_back({token, positions[token],
                             (int)std::min<int64_t>(queries, starts[run + 1] - token),
                             tables + run * table_blocks});
    // The longest first, so that no thread is left with one when all others are done.
    const auto work = [=](const Task& task) {
        return (std::min(task.position, window) + task.count) * task.count;
    };
    std::stable_sort(tasks.begin(), tasks.end(), [=](const Task& a, const Task& b) {
        return work(a) > work(b);
    });
    const int64_t pieces = (int64_t)tasks.size() * cache.kv_heads;
#pragma omp parallel num_threads(threads) if (pieces > 1)
    {
        static thread_local Attending<T, E> own;
        Attending<T, E>* attending = &own;
        // From here on a pointer like any other: as the address of a thread's own, the compiler asks
        // for it in every loop, with a call before which vector registers are saved.
        asm("" : "+r"(attending));
#pragma omp for schedule(dynamic, 1)
        for (int64_t piece = 0; piece < pieces; ++piece)
            attending->run(tasks[piece / cache.kv_heads], piece % cache.kv_heads, q, pool, out,
                          cache, heads, scale, window);
    }
}

}  // namespace
