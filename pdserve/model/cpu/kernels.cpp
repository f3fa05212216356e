// What torch lacks on a CPU: paged attention, fused norms, rotary + cache write, SwiGLU; and linear
// layers of bfloat16, which are faster here with few rows, and whose weights may lie quantised.
//
// The promise: what is computed for a row depends on that row (and, in attention, the keys and
// values before it) alone, to the bit. Hence the rules of this file:
//   * One piece of code per row. Remainders go through the same vector code, padded with zeros.
//   * Sums run in an order fixed by the row's own coordinates: channels in order, 16 partial sums
//     per row, positions in order, in tiles cut at absolute multiples of TILE. How many rows share
//     a register block, a tile of queries or a thread never changes a row's operations.
//   * No -ffast-math. Products and sums fuse alike in every instantiation of a template; the
//     identity test would show a compiler that does otherwise.
// Sums are float32; inputs and outputs are float32, bfloat16 or float16, rounded to nearest even.
// How 16 of them are loaded, stored and computed with: vectors.h; how they are multiplied where there
// is much to multiply, in attention.h and linear.h: products.h.
//
// Shape letters as in ops.py: N tokens, H query heads, G key/value heads, D channels of a head,
// T tokens of a block, R runs, B blocks of a table.

#include <array>
#include <cstdint>
#include <type_traits>

#include <omp.h>
#include <sched.h>

#include "attention.h"
#include "layers.h"
#include "linear.h"
#include "rows.h"

namespace {

template <class F> void with_type(int type, F run) {
    if (type == 0) run((float*)nullptr);
    else if (type == 1) run((bfloat16*)nullptr);
    else run((float16*)nullptr);
}

// What the model computes with, and what its pool is made of.
template <class F> void with_types(int type, int64_t coded, F run) {
    with_type(type, [&](auto* t) {
        if (coded) run(t, (int8*)nullptr);
        else run(t, t);
    });
}

}  // namespace

// ── what library.py calls; `type` is 0 float32, 1 bfloat16, 2 float16; `coded`: is the pool? ───────────────────────────

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

void pdserve_gelu_mul(int type, const void* gate_up, void* out, int64_t rows, int64_t channels,
                      int threads) {
    with_type(type, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        gelu_mul((const T*)gate_up, (T*)out, rows, channels, threads);
    });
}

void pdserve_rope_and_cache(int type, const void* q, int64_t q_stride, const void* k,
                            int64_t k_stride, const void* v, int64_t v_stride, const float* rope,
                            const int64_t* positions, const int64_t* slots, void* q_out, void* pool,
                            int64_t coded, int64_t block_stride, int64_t offset,
                            int64_t head_stride, int64_t block_tokens, int64_t kv_heads,
                            int64_t head_dim, int64_t tokens, int64_t heads, int threads) {
    const Cache cache{block_stride, offset, head_stride, block_tokens, kv_heads, head_dim};
    with_types(type, coded, [&](auto* t, auto* e) {
        using T = std::remove_pointer_t<decltype(t)>;
        using E = std::remove_pointer_t<decltype(e)>;
        rope_and_cache((const T*)q, q_stride, (const T*)k, k_stride, (const T*)v, v_stride, rope,
                       positions, slots, (T*)q_out, (E*)pool, cache, tokens, heads, threads);
    });
}

void pdserve_attention(int type, const void* q, const void* pool, void* out,
                       const int64_t* positions, const int32_t* starts, const int32_t* tables,
                       int64_t table_blocks, int64_t runs, int64_t coded, int64_t block_stride,
                       int64_t offset, int64_t head_stride, int64_t block_tokens, int64_t kv_heads,
                       int64_t head_dim, int64_t heads, float scale, int64_t window, int threads) {
    const Cache cache{block_stride, offset, head_stride, block_tokens, kv_heads, head_dim};
    with_types(type, coded, [&](auto* t, auto* e) {
        using T = std::remove_pointer_t<decltype(t)>;
        using E = std::remove_pointer_t<decltype(e)>;
        attention((const T*)q, (const E*)pool, (T*)out, positions, starts, tables, table_blocks,
                  runs, cache, heads, scale, window, threads);
    });
}

// Whether there are linear layers here, of bfloat16; the other four are for where there are.
int pdserve_has_linear() { return HAS_LINEAR; }

int64_t pdserve_packed_bytes(int64_t format, int64_t outputs, int64_t channels) {
    return packed_bytes(format, outputs, channels);
}

void pdserve_pack_linear(int64_t format, const void* weight, void* packed, int64_t outputs,
                         int64_t channels, int threads) {
    pack_linear(format, (const char*)weight, (char*)packed, outputs, channels, threads);
}

void pdserve_unpacked_rows(int64_t format, const int64_t* named, const void* packed, void* out,
                           int64_t count, int64_t channels, int threads) {
    unpacked_rows(format, named, (const char*)packed, (bfloat16*)out, count, channels, threads);
}

void pdserve_linear(int, const void* x, int64_t x_stride, const void* packed, const void* bias,
                    int64_t format, void* out, int64_t rows, int64_t channels, int64_t outputs,
                    int threads) {
    const Matrix weight{(const char*)packed, (const bfloat16*)bias, format};
    linear((const bfloat16*)x, x_stride, weight, (bfloat16*)out, rows, channels, outputs, threads);
}

void pdserve_layers(void* x, void* residual, const void* layers, const int64_t* sizes, float eps,
                    float scale, const int64_t* positions, const int64_t* slots,
                    const int32_t* starts, const int32_t* tables, const float* rope, void* pool,
                    const int64_t* windows, const void* adapted, void (*written)(int64_t),
                    int64_t every, int threads) {
    const auto [count, hidden, heads, ffn, coded, block_stride, layer_stride, head_stride,
                block_tokens, kv_heads, head_dim, tokens, runs, table_blocks, longest_context,
                elements, scored_elements, products, products_per_byte, adapted_count] =
        *(const std::array<int64_t, 20>*)sizes;
    const Cache cache{block_stride, 0, head_stride, block_tokens, kv_heads, head_dim};
    const Model model{count, hidden, heads, ffn, layer_stride, cache, eps, scale, windows};
    const Batch batch{tokens, runs, table_blocks, longest_context, positions, slots, starts, tables,
                      adapted_count, (const Adapted*)adapted};
    const Team team{threads, elements, scored_elements, products, products_per_byte};
    const auto run = [&](auto* pool_elements) {
        run_layers((bfloat16*)x, (bfloat16*)residual, (const Layer*)layers, model, batch, rope,
                   pool_elements, team, Told{written, every});
    };
    if (coded) run((int8*)pool);
    else run((bfloat16*)pool);
}
}
