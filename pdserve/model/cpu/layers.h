// All layers of a step in one call: what layers.py's LayerByLayer does, operation by operation and
// bit for bit, less what Python takes between two of them: a quarter of a decoded token's time, for
// a small model. bfloat16 only, since linear layers are; the pool may hold codes.

#pragma once

#include "attention.h"
#include "linear.h"
#include "low_rank.h"
#include "pool.h"
#include "rows.h"

namespace {

// As cpu_layers.py fills it: matrices and norms; null where there is none.
struct Layer {
    const bfloat16 *attention_norm, *q_norm, *k_norm, *ffn_norm;
    Matrix qkv, output, gate_up, down;
};

struct Model {
    int64_t layers, hidden, heads, ffn, layer_stride;  // of the pool, in elements
    Cache cache;                                       // its offset is not used
    float eps, scale;
    const int64_t* windows;                            // of each layer; see attention.h
};

struct Batch {
    int64_t tokens, runs, table_blocks, longest_context;
    const int64_t *positions, *slots;
    const int32_t *starts, *tables;
    int64_t adapted_count;
    const Adapted* adapted;
};

// Told, by the thread that called, how many layers' keys and values are in the pool: after every
// so many, and after the last.
struct Told {
    void (*written)(int64_t);
    int64_t every;
};

// Who computes: everybody, or one thread where less than so much is to be done.
struct Team {
    int threads;
    int64_t elements, scored_elements, products, products_per_byte;

    int of(int64_t work, int64_t enough) const { return work < enough ? 1 : threads; }
};

// The heads of q or k, each a row of its own, in place.
inline void norm_heads(bfloat16* x, int64_t stride, const bfloat16* weight, int64_t tokens,
                       int64_t heads, int64_t dim, float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens * heads * dim > SMALL)
    for (int64_t n = 0; n < tokens; ++n)
        for (int64_t h = 0; h < heads; ++h) {
            bfloat16* row = x + n * stride + h * dim;
            norm_row(row, weight, row, dim, eps);
        }
}

// The residual [N, C], at first the embedded tokens, goes through all layers; x [N, C] becomes what
// the last one adds to it.
template <class E>
void run_layers(bfloat16* x, bfloat16* residual, const Layer* layers, const Model& model,
                const Batch& batch, const float* rope, E* pool, const Team& team,
                const Told& told) {
    static thread_local std::vector<bfloat16> scratch;
    const int64_t dim = model.cache.head_dim, kv_heads = model.cache.kv_heads, n = batch.tokens;
    const int64_t attended = model.heads * dim, kept = kv_heads * dim, joined = attended + 2 * kept;
    constexpr int64_t line = LINE / sizeof(bfloat16);
    const size_t needed = n * (joined + 2 * attended + 3 * model.ffn) + line;
    if (scratch.size() < needed) scratch.resize(needed);
    // From a cache line's beginning on, so that where rows are whole lines, vectors are.
    bfloat16* qkv = (bfloat16*)(((uintptr_t)scratch.data() + LINE - 1) / LINE * LINE);
    bfloat16* turned = qkv + n * joined;
    bfloat16* mixed = turned + n * attended;
    bfloat16* gate_up = mixed + n * attended;
    bfloat16* active = gate_up + n * 2 * model.ffn;

    const auto multiply = [&](const bfloat16* from, int64_t channels, const Matrix& weight,
                              bfloat16* to, int64_t outputs, int64_t rows) {
        const int64_t bytes = packed_bytes(weight.format, outputs, channels);
        const int64_t work = outputs * channels * rows + bytes * team.products_per_byte;
        linear(from, channels, weight, to, rows, channels, outputs, team.of(work, team.products));
    };
    const auto adapt = [&](int64_t l, LowRank AdapterLayer::*part, const bfloat16* from,
                           int64_t channels, bfloat16* to, int64_t outputs) {
        add_low_rank(batch.adapted, batch.adapted_count, l, part, from, channels, to, outputs,
                     multiply, team.of(n * outputs, team.elements));
    };
    const auto norm = [&](const bfloat16* weight) {
        add_rms_norm(x, residual, weight, x, residual, n, model.hidden, model.eps,
                     team.of(n * model.hidden, team.elements));
    };
    rms_norm(residual, model.hidden, layers[0].attention_norm, x, n, model.hidden, model.eps,
             team.of(n * model.hidden, team.elements));
    for (int64_t l = 0; l < model.layers; ++l) {
        const Layer& layer = layers[l];
        Cache cache = model.cache;
        cache.offset = l * model.layer_stride;
        bfloat16* keys = qkv + attended;
        multiply(x, model.hidden, layer.qkv, qkv, joined, n);
        adapt(l, &AdapterLayer::qkv, x, model.hidden, qkv, joined);
        if (layer.q_norm) {
            const int threads = team.of(n * attended, team.elements);
            norm_heads(qkv, joined, layer.q_norm, n, model.heads, dim, model.eps, threads);
            norm_heads(keys, joined, layer.k_norm, n, kv_heads, dim, model.eps, threads);
        }
        rope_and_cache(qkv, joined, keys, joined, keys + kept, joined, rope, batch.positions,
                       batch.slots, turned, pool, cache, n, model.heads,
                       team.of(n * attended, team.elements));
        if (told.written && ((l + 1) % told.every == 0 || l + 1 == model.layers))
            told.written(l + 1);
        const int64_t seen = std::min(batch.longest_context, model.windows[l]);
        attention(turned, pool, mixed, batch.positions, batch.starts, batch.tables,
                  batch.table_blocks, batch.runs, cache, model.heads, model.scale,
                  model.windows[l], team.of(n * attended * seen, team.scored_elements));
        multiply(mixed, attended, layer.output, x, model.hidden, n);
        adapt(l, &AdapterLayer::output, mixed, attended, x, model.hidden);
        norm(layer.ffn_norm);
        multiply(x, model.hidden, layer.gate_up, gate_up, 2 * model.ffn, n);
        adapt(l, &AdapterLayer::gate_up, x, model.hidden, gate_up, 2 * model.ffn);
        silu_mul(gate_up, active, n, model.ffn, team.of(n * 2 * model.ffn, team.elements));
        multiply(active, model.ffn, layer.down, x, model.hidden, n);
        adapt(l, &AdapterLayer::down, active, model.ffn, x, model.hidden);
        if (l + 1 < model.layers) norm(layers[l + 1].attention_norm);
    }
}

}  // namespace
