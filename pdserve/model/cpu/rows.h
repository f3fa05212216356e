// What is computed row by row: norms, SwiGLU, rotary embedding with the cache write.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include <omp.h>

#include "codec.h"
#include "pool.h"
#include "vectors.h"

namespace {

constexpr int64_t SMALL = 1 << 14;  // elements below which a second thread costs more than it saves

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

// What a gate is divided by is 1 + e^-x of this x: silu's, and that of gelu in its tanh form,
// x = sqrt(8 / pi) * (g + 0.044715 g^3).
inline Vec silu_exponent(Vec g) { return g; }
inline Vec gelu_exponent(Vec g) { return g * (g * g * 0.0713548163f + 1.59576912f); }

template <Vec (*EXPONENT)(Vec), class T>
void gate_mul(const T* gate_up, T* out, int64_t rows, int64_t channels, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * channels > SMALL)
    for (int64_t row = 0; row < rows; ++row) {
        const T* gate = gate_up + row * 2 * channels;
        for (int64_t c = 0; c < channels; c += LANES) {
            const Vec g = load_at(gate, c, channels);
            const Vec u = load_at(gate + channels, c, channels);
            store_at(out + row * channels, c, channels, g / (exp_of(-EXPONENT(g)) + 1.0f) * u);
        }
    }
}

template <class T>
void silu_mul(const T* gate_up, T* out, int64_t rows, int64_t channels, int threads) {
    gate_mul<silu_exponent>(gate_up, out, rows, channels, threads);
}

template <class T>
void gelu_mul(const T* gate_up, T* out, int64_t rows, int64_t channels, int threads) {
    gate_mul<gelu_exponent>(gate_up, out, rows, channels, threads);
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

// The turned key and the value of one token and head; E is what the pool is made of: T, or codes.
template <class T, class E>
void put(const T* k, const T* v, const float* angles, E* pool, int64_t key, int64_t scale,
         int64_t to_values, int64_t dim) {
    if constexpr (std::is_same_v<T, E>) {
        turn(k, angles, pool + key, dim / 2);
        std::memcpy(pool + key + to_values, v, dim * sizeof(T));
    } else {
        static thread_local std::vector<T> turned;
        turned.resize(dim);
        turn(k, angles, turned.data(), dim / 2);
        encode(turned.data(), pool + key, (bfloat16*)(pool + scale), dim);
        encode(v, pool + key + to_values, (bfloat16*)(pool + scale + to_values), dim);
    }
}

template <class T, class E>
void rope_and_cache(const T* q, int64_t q_stride, const T* k, int64_t k_stride, const T* v,
                    int64_t v_stride, const float* rope, const int64_t* positions,
                    const int64_t* slots, T* q_out, E* pool, Cache cache, int64_t tokens,
                    int64_t heads, int threads) {
    const int64_t dim = cache.head_dim;
#pragma omp parallel for num_threads(threads) if (tokens * heads * dim > SMALL)
    for (int64_t n = 0; n < tokens; ++n) {
        const float* angles = rope + positions[n] * dim;
        for (int64_t h = 0; h < heads; ++h)
            turn(q + n * q_stride + h * dim, angles, q_out + (n * heads + h) * dim, dim / 2);
        const int64_t block = slots[n] / cache.block_tokens, token = slots[n] % cache.block_tokens;
        for (int64_t g = 0; g < cache.kv_heads; ++g) {
            put(k + n * k_stride + g * dim, v + n * v_stride + g * dim, angles, pool,
                cache.key(block, g, token), cache.scale(block, g, token), cache.to_values(), dim);
        }
    }
}

}  // namespace
