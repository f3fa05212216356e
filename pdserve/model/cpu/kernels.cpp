// What torch lacks on a CPU: paged attention, fused norms, rotary + cache write, SwiGLU; and linear
// layers of bfloat16, which are faster here with few rows.
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

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <omp.h>
#include <sched.h>

#include "attention.h"
#include "linear.h"
#include "pool.h"
#include "vectors.h"

namespace {

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

// Whether there are linear layers here, of bfloat16; the other three are for where there are.
int pdserve_has_linear() { return HAS_LINEAR; }

int64_t pdserve_packed_elements(int64_t outputs, int64_t channels) {
    return packed_elements(outputs, channels);
}

void pdserve_pack_linear(const void* weight, void* packed, int64_t outputs, int64_t channels,
                         int threads) {
    pack_linear((const bfloat16*)weight, (bfloat16*)packed, outputs, channels, threads);
}

void pdserve_linear(int, const void* x, int64_t x_stride, const void* packed, const void* bias,
                    void* out, int64_t rows, int64_t channels, int64_t outputs, int threads) {
    linear((const bfloat16*)x, x_stride, (const bfloat16*)packed, (const bfloat16*)bias,
           (bfloat16*)out, rows, channels, outputs, threads);
}
}
