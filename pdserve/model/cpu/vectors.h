// 16 floats at once: from and to memory in three types, and the arithmetic that kernels.cpp adds to
// the compiler's own. Vectors are GCC's, which the compiler maps to what the machine has.
//
// Every operation treats its lanes alike, and a remainder is a whole vector with zeros behind: so a
// value's bits do not depend on its lane, nor on whether its row ends there.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

// Where a call would have all vector registers saved before it.
#define INLINED inline __attribute__((always_inline))

constexpr int LANES = 16;
constexpr int LINE = 64;  // bytes of a cache line

typedef float Vec __attribute__((vector_size(64)));
typedef int32_t Int __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint16_t Half __attribute__((vector_size(32)));
typedef int8_t Codes __attribute__((vector_size(16)));

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };
struct int8 { int8_t code; };  // of a coded key or value; the scale stands elsewhere

inline Vec all(float x) { return Vec{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

// ── 16 elements of memory to and from a vector ──────────────────────────────────────────────────

inline Bits widened(const void* from) {
    Half half;
    std::memcpy(&half, from, sizeof half);
    return __builtin_convertvector(half, Bits);
}

inline void store_narrowed(void* to, Bits bits) {
    const Half half = __builtin_convertvector(bits, Half);
    std::memcpy(to, &half, sizeof half);
}

inline Vec load(const float* from) {
    Vec x;
    std::memcpy(&x, from, sizeof x);
    return x;
}
inline Vec load(const bfloat16* from) { return (Vec)(widened(from) << 16); }
inline Vec load(const float16* from) {
    const Bits half = widened(from);
    const Bits magnitude = (half & 0x7fff) << 13;
    // Times 2^112 moves the exponent from half's bias to float's, denormals included.
    const Bits finite = (Bits)((Vec)magnitude * all(0x1p112f));
    const Bits special = (Bits)((half & 0x7c00) == 0x7c00);  // infinity, NaN
    return (Vec)(((special & (magnitude | 0x7f800000)) | (~special & finite)) |
                 ((half & 0x8000) << 16));
}
inline Vec load(const int8* from) {
    Codes codes;
    std::memcpy(&codes, from, sizeof codes);
    return __builtin_convertvector(__builtin_convertvector(codes, Int), Vec);
}

inline void store(float* to, Vec x) { std::memcpy(to, &x, sizeof x); }
inline void store(bfloat16* to, Vec x) {
#ifdef __AVX512BF16__
    const __m256bh half = _mm512_cvtneps_pbh((__m512)x);  // denormals are zero, as in products.h
    std::memcpy(to, &half, sizeof half);
#else
    const Bits bits = (Bits)x;
    const Bits nan = (Bits)(x != x);
    const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    store_narrowed(to, (nan & 0x7fc0) | (~nan & rounded));
#endif
}
inline void store(float16* to, Vec x) {
    const Bits sign = ((Bits)x >> 16) & 0x8000;
    const Bits bits = (Bits)x & 0x7fffffff;
    const Bits nan = (Bits)(bits > 0x7f800000);
    const Bits large = (Bits)(bits >= 0x477ff000);       // rounds to infinity
    const Bits tiny = (Bits)(bits < 0x38800000);         // denormal as a half
    const Bits normal = (bits + 0xc8000fff + ((bits >> 13) & 1)) >> 13;
    const Bits denormal = (Bits)((Vec)bits + all(0.5f)) - 0x3f000000;  // the addition rounds
    const Bits finite = (tiny & denormal) | (~tiny & normal);
    store_narrowed(to, sign | (nan & 0x7e00) | (~nan & large & 0x7c00) | (~nan & ~large & finite));
}
inline void store(int8* to, Vec x) {  // of magnitude below 127.5
    const Int whole = (Int)(x + all(0x1.8p23f));  // adding it rounds; whole numbers are low bits
    const Codes codes = __builtin_convertvector(whole, Codes);
    std::memcpy(to, &codes, sizeof codes);
}

// The first `count` < 16 elements; the other lanes are zero, or are not written.
template <class T> Vec load_first(const T* from, int64_t count) {
    T padded[LANES] = {};
    std::memcpy(padded, from, count * sizeof(T));
    return load(padded);
}
template <class T> void store_first(T* to, Vec x, int64_t count) {
    T padded[LANES];
    store(padded, x);
    std::memcpy(to, padded, count * sizeof(T));
}
template <class T> inline Vec load_at(const T* row, int64_t index, int64_t size) {
    return index + LANES <= size ? load(row + index) : load_first(row + index, size - index);
}
template <class T> inline void store_at(T* row, int64_t index, int64_t size, Vec x) {
    if (index + LANES <= size) store(row + index, x);
    else store_first(row + index, x, size - index);
}

// ── arithmetic ──────────────────────────────────────────────────────────────────────────────────

constexpr Int LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// Halves onto each other, four times.
inline float sum_of(Vec x) {
    for (int step = LANES / 2; step > 0; step /= 2) x += __builtin_shuffle(x, LANE ^ step);
    return x[0];
}

inline float max_of(Vec x) {
    for (int step = LANES / 2; step > 0; step /= 2)
        x = larger(x, __builtin_shuffle(x, LANE ^ step));
    return x[0];
}

// Horner's rule, the highest power first.
template <int COUNT> inline Vec polynomial(const float (&factors)[COUNT], Vec x) {
    Vec sum = all(factors[0]);
    for (int i = 1; i < COUNT; ++i) sum = sum * x + factors[i];
    return sum;
}

// To the nearest whole number, and that power of two; x is finite.
#ifdef __AVX512F__
inline Vec rounded(Vec x) {
    return (Vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Vec times_power(Vec x, Vec whole) {
    return (Vec)_mm512_scalef_ps((__m512)x, (__m512)whole);
}
#else
inline Vec rounded(Vec x) {
    const Vec magic = all(0x1.8p23f);  // adding it leaves no room for a fraction
    return (x + magic) - magic;
}
inline Vec times_power(Vec x, Vec whole) {
    return (Vec)((Int)x + (__builtin_convertvector(whole, Int) << 23));
}
#endif

// 2^x to about 2 ulp for x <= 0; exactly 1 at 0, exactly 0 below -126 (so at minus infinity), and
// for NaN, NaN.
INLINED Vec exp2_of(Vec x) {
    const Vec low = all(-126.0f);
    const Vec bounded = x < low ? low : x;
    const Vec whole = rounded(bounded);
    const Vec rest = bounded - whole;
    // Chebyshev interpolation of 2^rest on [-1/2, 1/2]; relative error 2e-8 before rounding.
    const Vec sum = polynomial({1.546144777e-04f, 1.339086681e-03f, 9.618056938e-03f,
                                5.550356954e-02f, 2.402265072e-01f, 6.931471825e-01f, 1.0f},
                               rest);
    const Vec result = times_power(sum, whole);
    return x < low ? all(0.0f) : result;
}

// e^x to about 1 ulp; exactly 1 at 0, exactly 0 below -87 (so at minus infinity), and for NaN, NaN.
INLINED Vec exp_of(Vec x) {
    const Vec low = all(-87.0f), high = all(88.0f);
    Vec bounded = x < low ? low : x;
    bounded = bounded > high ? high : bounded;
    const Vec whole = rounded(bounded * 1.44269504f);
    Vec rest = bounded - whole * 0.693359375f;
    rest = rest - whole * -2.12194440e-4f;
    Vec sum = polynomial({1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                          1.6666665459e-1f, 5.0000001201e-1f},
                         rest);
    sum = sum * (rest * rest) + rest + 1.0f;
    const Vec result = times_power(sum, whole);
    return x < low ? all(0.0f) : result;
}

}  // namespace
