// What LoRA adapters add to the linear layers of their rows: adapters.py's add_low_rank, operation
// by operation and bit for bit.

#pragma once

#include <vector>

#include "linear.h"
#include "rows.h"

namespace {

// As cpu_layers.py fills them. y += b (a x); rank 0 where a layer is not adapted.
struct LowRank {
    Matrix a, b;
    int64_t rank;
};

struct AdapterLayer {
    LowRank qkv, output, gate_up, down;
};

// `count` tokens of a batch from `first` on are one adapter's.
struct Adapted {
    int64_t first, count;
    const AdapterLayer* layers;
};

template <class T> void add_to(T* sum, const T* x, int64_t elements, int threads) {
#pragma omp parallel for num_threads(threads) if (elements > SMALL)
    for (int64_t i = 0; i < elements; i += LANES)
        store_at(sum, i, elements, load_at(sum, i, elements) + load_at(x, i, elements));
}

// y [N, O] of x [N, C], for the adapted rows among them. `multiply` is a linear layer: rows from,
// their channels, weight, rows to, outputs, count.
template <class Multiply>
void add_low_rank(const Adapted* adapted, int64_t adapted_count, int64_t layer,
                  LowRank AdapterLayer::*part, const bfloat16* x, int64_t channels, bfloat16* y,
                  int64_t outputs, const Multiply& multiply, int threads) {
    static thread_local std::vector<bfloat16> scratch;
    for (const Adapted* rows = adapted; rows != adapted + adapted_count; ++rows) {
        const LowRank& low_rank = rows->layers[layer].*part;
        if (low_rank.rank == 0) continue;
        const size_t needed = rows->count * (low_rank.rank + outputs);
        if (scratch.size() < needed) scratch.resize(needed);
        bfloat16* narrow = scratch.data();
        bfloat16* wide = narrow + rows->count * low_rank.rank;
        multiply(x + rows->first * channels, channels, low_rank.a, narrow, low_rank.rank,
                 rows->count);
        multiply(narrow, low_rank.rank, low_rank.b, wide, outputs, rows->count);
        add_to(y + rows->first * outputs, wide, rows->count * outputs, threads);
    }
}

}  // namespace
