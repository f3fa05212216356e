// How attention multiplies: sum of 16 lanes += PACK elements of each lane, times PACK of one row.
//
// float32 and float16 are multiplied as float32, one element at a time. bfloat16, where the CPU has
// the instruction (AVX512-BF16), is multiplied as it is, two at a time: each product is exact, both
// are added to the float32 sum in a fixed order, which is twice the work per instruction and half
// the bytes. What the instruction flushes, denormals, lies 10^-38 from zero.

#pragma once

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "vectors.h"

namespace {

template <class T> struct Products {
    static constexpr int PACK = 1;
    typedef float Element;  // PACK of one row, as each lane has them
    typedef Vec Elements;

    static Vec add(Vec sum, Elements lanes, Element row) { return sum + lanes * row; }

    // PACK * 16 elements in a row, from `index` on.
    static Elements along(const T* row, int64_t index, int64_t size) {
        return load_at(row, index, size);
    }
    // 16 elements from `index` on of PACK rows, those of one column side by side.
    static Elements across(const T* const* rows, int64_t index, int64_t size) {
        return rows[0] ? load_at(rows[0], index, size) : all(0.0f);
    }
    static void narrow(Vec x, void* to) { std::memcpy(to, &x, sizeof x); }
};

#ifdef __AVX512BF16__
template <> struct Products<bfloat16> {
    static constexpr int PACK = 2;
    typedef uint32_t Element;
    typedef Bits Elements;

    static Vec add(Vec sum, Elements lanes, Element row) {
        const __m512i pairs = _mm512_set1_epi32((int)row);
        return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)lanes, (__m512bh)pairs);
    }
    static Elements along(const bfloat16* row, int64_t index, int64_t size) {
        Elements pairs = {};
        if (index + PACK * LANES <= size) std::memcpy(&pairs, row + index, sizeof pairs);
        else std::memcpy(&pairs, row + index, (size - index) * sizeof *row);
        return pairs;
    }
    static Elements across(const bfloat16* const* rows, int64_t index, int64_t size) {
        const __m512i first = half_of(rows[0], index, size), second = half_of(rows[1], index, size);
        return (Bits)(first | _mm512_slli_epi32(second, 16));
    }
    static __m512i half_of(const bfloat16* row, int64_t index, int64_t size) {
        __m256i half = {};
        if (row && index + LANES <= size) std::memcpy(&half, row + index, sizeof half);
        else if (row) std::memcpy(&half, row + index, (size - index) * sizeof *row);
        return _mm512_cvtepu16_epi32(half);
    }
    static void narrow(Vec x, void* to) {
        const __m256bh half = _mm512_cvtneps_pbh((__m512)x);
        std::memcpy(to, &half, sizeof half);
    }
};
#endif

}  // namespace
