// Keys and values in 8 bits: what kv_codec.py means, with its bits.

#pragma once

#include <algorithm>
#include <cstdint>

#if defined(__AVX512BW__) && defined(__AVX512VBMI__)
#include <immintrin.h>
#endif

#include "vectors.h"

namespace {

constexpr float LARGEST_CODE = 127.0f;
constexpr float SCALE_MIN = 0x1p-100f;  // what is smaller is zero

// A row as codes and a scale. Divisions, unlike products, are never fused with what follows.
template <class T> void encode(const T* row, int8* codes, bfloat16* scale, int64_t dim) {
    Int largest = {};  // bits of magnitudes: they compare like numbers, and a NaN is the largest
    for (int64_t c = 0; c < dim; c += LANES) {
        const Int magnitude = (Int)load_at(row, c, dim) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    uint32_t most = 0;
    for (int lane = 0; lane < LANES; ++lane) most = std::max(most, (uint32_t)largest[lane]);
    float magnitude;
    std::memcpy(&magnitude, &most, sizeof magnitude);
    store_first(scale, all(magnitude / LARGEST_CODE), 1);
    float divisor = load_first(scale, 1)[0];
    if (divisor < SCALE_MIN) {
        store_first(scale, all(0.0f), 1);
        divisor = 1.0f;
    }
    for (int64_t c = 0; c < dim; c += LANES)
        store_at(codes, c, dim, load_at(row, c, dim) / divisor);
}

// Codes as the numbers they are, without the scale: exact in every type.
template <class T> void decode(const int8* codes, T* row, int64_t dim) {
    for (int64_t c = 0; c < dim; c += LANES) store_at(row, c, dim, load_at(codes, c, dim));
}

#if defined(__AVX512BW__) && defined(__AVX512VBMI__)
// The two bytes of a whole number in bfloat16, and which of 2 x 64 go where to make 64 numbers.
struct Tables {
    alignas(LINE) uint8_t low[128] = {}, high[128] = {};
    alignas(LINE) uint8_t order[128] = {};

    constexpr Tables() {
        for (int number = 1, exponent = 0; number < 128; ++number) {
            if (number >> (exponent + 1)) ++exponent;
            const int bits = ((127 + exponent) << 7) | (((number << 7) >> exponent) & 0x7f);
            low[number] = (uint8_t)bits;
            high[number] = (uint8_t)(bits >> 8);
        }
        for (int i = 0; i < 64; ++i) {
            order[2 * i] = (uint8_t)i;
            order[2 * i + 1] = (uint8_t)(64 + i);
        }
    }
};

// The same for bfloat16, 64 at a time, from tables.
inline void decode(const int8* codes, bfloat16* row, int64_t dim) {
    static constexpr Tables tables;
    const auto table = [](const uint8_t* from) { return _mm512_load_si512(from); };
    for (int64_t c = 0; c < dim; c += 64) {
        const __mmask64 some = dim - c >= 64 ? ~0ull : (1ull << (dim - c)) - 1;
        const __m512i code = _mm512_maskz_loadu_epi8(some, codes + c);
        const __m512i number = _mm512_abs_epi8(code);
        const __m512i low =
            _mm512_permutex2var_epi8(table(tables.low), number, table(tables.low + 64));
        const __m512i high =
            _mm512_permutex2var_epi8(table(tables.high), number, table(tables.high + 64)) |
            (code & _mm512_set1_epi8(-128));
        _mm512_mask_storeu_epi16(row + c, (__mmask32)some,
                                 _mm512_permutex2var_epi8(low, table(tables.order), high));
        _mm512_mask_storeu_epi16(row + c + 32, (__mmask32)(some >> 32),
                                 _mm512_permutex2var_epi8(low, table(tables.order + 64), high));
    }
}
#endif

}  // namespace
