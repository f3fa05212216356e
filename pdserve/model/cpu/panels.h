// How the weights of a linear layer lie in memory: panels of 64 outputs, in one of five formats.
//
// What is multiplied is always bfloat16, pairs of neighbouring channels [C / 2, 64, 2]: a panel of
// the format `Plain` holds just that. The others hold groups of 32 channels as GGUF files do, whole
// numbers q with a scale and perhaps a minimum per output and group, and are unpacked on the way to
// the multiplication into the very bits of the weight dequantised and rounded:
//
//     weight = bfloat16(scale * q + minimum)
//
// Where there is a minimum, scale * q is exact in float32 (at most 20 bits times 4), so one fused
// step rounds as a product and a sum do. A layer's results are therefore those of its weights in bfloat16, to the bit, in whatever
// format they lie; what differs is how much is read. Unpacking 32 weights takes 0.8 ns on a server
// core of 2024, in which it reads 16 bytes: 4 bits with scale and minimum are 20, bfloat16 is 64.
//
// A conversion from two vectors of float32 puts the second behind the first. So of 16 outputs, the
// lanes of a vector of pairs, the first vector (`low`) has outputs 0 to 7, lane 2i the first channel
// of output i and lane 2i + 1 the second; the other (`high`) has outputs 8 to 15. Scales and minima
// are spread likewise.

#pragma once

#include "products.h"

namespace {

#ifdef __AVX512BF16__

constexpr int PANEL = 64;  // outputs
constexpr int PANEL_VECTORS = PANEL / LANES;
constexpr int GROUP = 32;  // channels with one scale
constexpr int GROUP_PAIRS = GROUP / 2;
constexpr int HALF = LANES / 2;

inline int64_t panels_of(int64_t outputs) { return (outputs + PANEL - 1) / PANEL; }

// A group of a panel as it is multiplied.
typedef Bits GroupOfPairs[GROUP_PAIRS * PANEL_VECTORS];

// A format says how many bytes a panel takes here and one output's weights outside, puts the latter
// into their `lane` of a panel that is zero, and gives a group's pairs from `pair` on, the group's
// first: where they lie, or unpacked.

struct Plain {
    static int64_t panel_bytes(int64_t channels) { return (channels + channels % 2) * PANEL * 2; }
    static int64_t row_bytes(int64_t channels) { return channels * 2; }

    static void pack(const char* row, char* panel, int64_t channels, int lane) {
        uint16_t* packed = (uint16_t*)panel;
        for (int64_t c = 0; c < channels; ++c)
            std::memcpy(packed + (c / 2 * PANEL + lane) * 2 + c % 2, row + c * 2, 2);
    }
    static const Bits* pairs(const char* panel, int64_t pair, GroupOfPairs&) {
        return (const Bits*)panel + pair * PANEL_VECTORS;
    }
};

// What a scale or a minimum is stored as; `sixteen` are those of as many outputs.
struct Float16 {
    static constexpr int BYTES = 2;
    static __m512 sixteen(const char* from) {
        return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
    }
};
struct Float32 {
    static constexpr int BYTES = 4;
    static __m512 sixteen(const char* from) { return _mm512_loadu_ps(from); }
};

// The scales or minima of 16 outputs, from `from` on, as `low` and `high` want them.
template <class Number> struct Spread {
    __m512 low, high;

    explicit Spread(const char* from) {
        const __m512 sixteen = Number::sixteen(from);
        const __m512i twice = (__m512i)(LANE / 2);
        low = _mm512_permutexvar_ps(twice, sixteen);
        high = _mm512_permutexvar_ps((__m512i)(LANE / 2 + HALF), sixteen);
    }
};

// Q4_1 of GGUF, with `Float16`: of 32 channels the scale, the minimum, and 16 bytes: channel i in the
// lower half of byte i, channel 16 + i in the upper. In a panel, per group: 64 scales, 64 minima,
// then for each 16 outputs 4 vectors, each of 4 pairs: byte p of a lane has pair p, `low` in its
// lower half.
template <class Number> struct Nibbles {
    static constexpr int MINIMA = PANEL * Number::BYTES, NUMBERS = 2 * MINIMA;  // where they begin
    static constexpr int HEAD = 2 * Number::BYTES;  // of a block outside: before its numbers
    static constexpr int BLOCK = HEAD + GROUP / 2, BYTES = NUMBERS + PANEL * GROUP / 2;
    static constexpr int PAIRS = 4;  // of one vector

    static int64_t panel_bytes(int64_t channels) { return channels / GROUP * BYTES; }
    static int64_t row_bytes(int64_t channels) { return channels / GROUP * BLOCK; }

    static void pack(const char* row, char* panel, int64_t channels, int lane) {
        const int half = lane % LANES / HALF, at = lane % HALF * 2;
        for (int64_t group = 0; group < channels / GROUP; ++group, row += BLOCK, panel += BYTES) {
            std::memcpy(panel + lane * Number::BYTES, row, Number::BYTES);
            std::memcpy(panel + MINIMA + lane * Number::BYTES, row + Number::BYTES, Number::BYTES);
            for (int c = 0; c < GROUP; ++c) {
                const int q = (uint8_t)row[HEAD + c % 16] >> c / 16 * 4 & 15;
                const int pair = c / 2, vector = lane / LANES * PAIRS + pair / PAIRS;
                const int dword = vector * LANES + at + c % 2;
                panel[NUMBERS + dword * 4 + pair % PAIRS] |= (char)(q << 4 * half);
            }
        }
    }
    static const Bits* pairs(const char* panel, int64_t pair, GroupOfPairs& unpacked) {
        const char* group = panel + pair / GROUP_PAIRS * BYTES;
        const char* numbers = group + NUMBERS;
        const __m512 table = (__m512)__builtin_convertvector(LANE, Vec);
        for (int v = 0; v < PANEL_VECTORS; ++v) {
            const int first = v * LANES * Number::BYTES;
            const Spread<Number> scale(group + first), minimum(group + MINIMA + first);
            for (int t = 0; t < GROUP_PAIRS / PAIRS; ++t) {
                const __m512i q = _mm512_loadu_si512(numbers);
                numbers += sizeof q;
#pragma GCC unroll 4
                for (int p = 0; p < PAIRS; ++p) {
                    // The lowest four bits choose the number; what is above them is not looked at.
                    const __m512i low_q = _mm512_srli_epi32(q, 8 * p);
                    const __m512i high_q = _mm512_srli_epi32(q, 8 * p + 4);
                    const __m512 low = _mm512_fmadd_ps(_mm512_permutexvar_ps(low_q, table),
                                                       scale.low, minimum.low);
                    const __m512 high = _mm512_fmadd_ps(_mm512_permutexvar_ps(high_q, table),
                                                        scale.high, minimum.high);
                    unpacked[(t * PAIRS + p) * PANEL_VECTORS + v] =
                        (Bits)_mm512_cvtne2ps_pbh(high, low);
                }
            }
        }
        return unpacked;
    }
};

// Q8_0 of GGUF, with one scale of `Float16`: of 32 channels the scale, then 32 signed bytes. More
// SCALES share the channels evenly. In a panel, per group: 64 first scales, then the second if there
// are, then for each 16 outputs 16 pairs, each 16 bytes `low` and 16 `high`.
template <class Number, int SCALES> struct Bytes {
    static constexpr int NUMBERS = PANEL * Number::BYTES * SCALES;  // where they begin
    static constexpr int HEAD = Number::BYTES * SCALES;  // of a block outside: before its numbers
    static constexpr int BLOCK = HEAD + GROUP, BYTES = NUMBERS + PANEL * GROUP;
    static constexpr int PAIRS = GROUP_PAIRS / SCALES;  // with one scale

    static int64_t panel_bytes(int64_t channels) { return channels / GROUP * BYTES; }
    static int64_t row_bytes(int64_t channels) { return channels / GROUP * BLOCK; }

    static void pack(const char* row, char* panel, int64_t channels, int lane) {
        const int half = lane % LANES / HALF, at = lane % HALF * 2;
        for (int64_t group = 0; group < channels / GROUP; ++group, row += BLOCK, panel += BYTES) {
            for (int s = 0; s < SCALES; ++s)
                std::memcpy(panel + (s * PANEL + lane) * Number::BYTES, row + s * Number::BYTES,
                            Number::BYTES);
            for (int c = 0; c < GROUP; ++c) {
                const int pair = lane / LANES * GROUP_PAIRS + c / 2;
                panel[NUMBERS + (pair * 2 + half) * LANES + at + c % 2] = row[HEAD + c];
            }
        }
    }
    static const Bits* pairs(const char* panel, int64_t pair, GroupOfPairs& unpacked) {
        const char* group = panel + pair / GROUP_PAIRS * BYTES;
        const __m128i* bytes = (const __m128i*)(group + NUMBERS);
        for (int v = 0; v < PANEL_VECTORS; ++v) {
            for (int s = 0; s < SCALES; ++s) {
                const Spread<Number> scale(group + (s * PANEL + v * LANES) * Number::BYTES);
                for (int p = s * PAIRS; p < (s + 1) * PAIRS; ++p, bytes += 2) {
                    const __m512 low = numbers(bytes) * scale.low;
                    const __m512 high = numbers(bytes + 1) * scale.high;
                    unpacked[p * PANEL_VECTORS + v] = (Bits)_mm512_cvtne2ps_pbh(high, low);
                }
            }
        }
        return unpacked;
    }
    static __m512 numbers(const __m128i* bytes) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes)));
    }
};

// The formats by the numbers that cpu_panels.py gives them.
template <class F> auto with_format(int64_t format, F run) {
    switch (format) {
        case 0: return run(Plain{});
        case 1: return run(Nibbles<Float16>{});
        case 2: return run(Bytes<Float16, 1>{});
        case 3: return run(Nibbles<Float32>{});
        default: return run(Bytes<Float32, 2>{});
    }
}

inline int64_t packed_bytes(int64_t format, int64_t outputs, int64_t channels) {
    return with_format(format,
                       [&](auto f) { return panels_of(outputs) * f.panel_bytes(channels); });
}

// rows [O], each as its format holds it outside, to packed [panels_of(O)], which is zero.
inline void pack_linear(int64_t format, const char* rows, char* packed, int64_t outputs,
                        int64_t channels, int threads) {
    with_format(format, [&](auto f) {
#pragma omp parallel for num_threads(threads)
        for (int64_t panel = 0; panel < panels_of(outputs); ++panel)
            for (int64_t o = panel * PANEL; o < std::min(outputs, (panel + 1) * PANEL); ++o)
                f.pack(rows + o * f.row_bytes(channels), packed + panel * f.panel_bytes(channels),
                       channels, o % PANEL);
    });
}

// out [N, C]: the weights of the named outputs, out of a format with whole groups.
inline void unpacked_rows(int64_t format, const int64_t* named, const char* packed, bfloat16* out,
                          int64_t count, int64_t channels, int threads) {
    with_format(format, [&](auto f) {
#pragma omp parallel for num_threads(threads)
        for (int64_t n = 0; n < count; ++n) {
            const char* panel = packed + named[n] / PANEL * f.panel_bytes(channels);
            uint32_t* to = (uint32_t*)(out + n * channels);
            GroupOfPairs unpacked;
            for (int64_t first = 0; first < channels / 2; first += GROUP_PAIRS) {
                const uint32_t* pairs = (const uint32_t*)f.pairs(panel, first, unpacked);
                for (int64_t pair = 0; pair < GROUP_PAIRS; ++pair)
                    std::memcpy(to++, pairs + pair * PANEL + named[n] % PANEL, sizeof *to);
            }
        }
    });
}

#endif

}  // namespace
