// Linear layers of bfloat16, where the CPU multiplies pairs of it (AVX512-BF16).
//
// Weights lie in panels of 64 outputs (panels.h), and are bfloat16 when they are multiplied. A
// register block of up to ROWS rows goes through a panel from its first channel to its last, each
// output in one float32 sum: so the bits of a row depend neither on the other rows nor on who
// computed them, nor on the panel's format.
//
// A panel comes from memory while the one before it is computed, since with a few dozen rows
// reading the weights takes as long as multiplying them. Pieces are taken as threads become free:
// one whose core does something else for a while keeps nobody waiting but for its own piece. A
// quantised panel is unpacked group by group into the first-level cache for one register block, and
// for more of them once, into the second-level cache, where panels of bfloat16 come to lie as well.

#pragma once

#include <omp.h>
#include <vector>

#include "panels.h"

namespace {

// A layer's weights, packed, and its bias; null if it has none.
struct Matrix {
    const char* packed;
    const bfloat16* bias;
    int64_t format;
};

#ifdef __AVX512BF16__

constexpr bool HAS_LINEAR = true;
constexpr int LINEAR_ROWS = 6;
constexpr int PIECES = 16;  // at least, if there are rows for them: 2 threads end together

typedef Products<bfloat16> Pairs;

// What comes next from memory: `left` lines from `at` on, `each` per look.
struct Ahead {
    const char* at;
    int64_t left, each;

    void look() {
        for (int64_t i = 0; i < each && left > 0; ++i, --left, at += LINE)
            __builtin_prefetch(at, 0, 2);
    }
};

template <int COUNT, class Format>
void linear_block(const bfloat16* x, int64_t x_stride, const char* panel, int64_t channels,
                  Vec sum[COUNT][PANEL_VECTORS], Ahead& ahead) {
    GroupOfPairs unpacked;
    for (int r = 0; r < COUNT; ++r)
        for (int v = 0; v < PANEL_VECTORS; ++v) sum[r][v] = all(0.0f);
    const int64_t whole = channels / 2;
    const auto multiply = [&](const Bits* weights, const auto& pair_of) {
        for (int r = 0; r < COUNT; ++r) {
            const uint32_t row = pair_of(r);
            for (int v = 0; v < PANEL_VECTORS; ++v)
                sum[r][v] = Pairs::add(sum[r][v], weights[v], row);
        }
    };
    for (int64_t first = 0; first < whole; first += GROUP_PAIRS) {
        ahead.look();
        const Bits* weights = Format::pairs(panel, first, unpacked);
        for (int64_t pair = first; pair < std::min(first + GROUP_PAIRS, whole); ++pair)
            multiply(weights + (pair - first) * PANEL_VECTORS, [&](int r) {
                uint32_t both;
                std::memcpy(&both, x + r * x_stride + 2 * pair, sizeof both);
                return both;
            });
    }
    if (channels % 2)
        multiply(Format::pairs(panel, whole, unpacked),
                 [&](int r) -> uint32_t { return x[r * x_stride + channels - 1].bits; });
}

template <int COUNT, class Format>
void linear_rows(const bfloat16* x, int64_t x_stride, const char* panel, int64_t channels,
                 const bfloat16* bias, bfloat16* out, int64_t outputs, int64_t first,
                 Ahead& ahead) {
    Vec sum[COUNT][PANEL_VECTORS];
    linear_block<COUNT, Format>(x, x_stride, panel, channels, sum, ahead);
    for (int v = 0; v < PANEL_VECTORS; ++v) {
        const int64_t o = first + v * LANES;
        if (o >= outputs) break;
        for (int r = 0; r < COUNT; ++r)
            store_at(out + r * outputs, o, outputs,
                     bias ? sum[r][v] + load_at(bias, o, outputs) : sum[r][v]);
    }
}

// A whole panel as `Plain` has it; the thread's own, until it asks for the next.
template <class Format> const char* unpacked_panel(const char* panel, int64_t channels) {
    static thread_local std::vector<Bits> whole;
    if ((int64_t)whole.size() < channels / 2 * PANEL_VECTORS)
        whole.resize(channels / 2 * PANEL_VECTORS);
    for (int64_t pair = 0; pair < channels / 2; pair += GROUP_PAIRS)
        Format::pairs(panel, pair, *(GroupOfPairs*)(whole.data() + pair * PANEL_VECTORS));
    return (const char*)whole.data();
}

// out [N, O] = x [N, C] times the packed weight's transpose, plus bias [O] if there is one.
template <class Format>
void linear_of(Format, const bfloat16* x, int64_t x_stride, const Matrix& weight, bfloat16* out,
               int64_t rows, int64_t channels, int64_t outputs, int threads) {
    const int64_t panels = panels_of(outputs), panel_bytes = Format::panel_bytes(channels);
    const int64_t blocks = (rows + LINEAR_ROWS - 1) / LINEAR_ROWS;
    const int64_t splits = std::min(blocks, std::max<int64_t>(1, (PIECES + panels - 1) / panels));
    const int64_t looks = (channels / 2 + GROUP_PAIRS - 1) / GROUP_PAIRS;
    const int64_t lines = panel_bytes / LINE;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t piece = 0; piece < panels * splits; ++piece) {
        const int64_t panel = piece / splits, split = piece % splits;
        const int64_t begin = split * blocks / splits, end = (split + 1) * blocks / splits;
        // The panel that this thread will probably take next.
        const int64_t next = (piece + threads) / splits;
        Ahead ahead{weight.packed + next * panel_bytes, 0, 0};
        if (next != panel && next < panels) {
            ahead.left = lines;
            ahead.each = (lines + looks * (end - begin) - 1) / (looks * (end - begin));
        }
        const auto run = [&](auto format, const char* weights) {
            using F = decltype(format);
            for (int64_t block = begin; block < end; ++block) {
                const int64_t row = block * LINEAR_ROWS;
                const auto call = [&](auto kernel) {
                    kernel(x + row * x_stride, x_stride, weights, channels, weight.bias,
                           out + row * outputs, outputs, panel * PANEL, ahead);
                };
                switch (std::min<int64_t>(LINEAR_ROWS, rows - row)) {
                    case 1: call(linear_rows<1, F>); break;
                    case 2: call(linear_rows<2, F>); break;
                    case 3: call(linear_rows<3, F>); break;
                    case 4: call(linear_rows<4, F>); break;
                    case 5: call(linear_rows<5, F>); break;
                    default: call(linear_rows<LINEAR_ROWS, F>); break;
                }
            }
        };
        const char* weights = weight.packed + panel * panel_bytes;
        if constexpr (!std::is_same_v<Format, Plain>)
            if (end - begin > 1) {
                run(Plain{}, unpacked_panel<Format>(weights, channels));
                continue;
            }
        run(Format{}, weights);
    }
}

inline void linear(const bfloat16* x, int64_t x_stride, const Matrix& weight, bfloat16* out,
                   int64_t rows, int64_t channels, int64_t outputs, int threads) {
    with_format(weight.format, [&](auto format) {
        linear_of(format, x, x_stride, weight, out, rows, channels, outputs, threads);
    });
}

#else

constexpr bool HAS_LINEAR = false;
inline int64_t packed_bytes(int64_t, int64_t, int64_t) { return 0; }
inline void pack_linear(int64_t, const char*, char*, int64_t, int64_t, int) {}
inline void unpacked_rows(int64_t, const int64_t*, const char*, bfloat16*, int64_t, int64_t, int) {}
inline void linear(const bfloat16*, int64_t, const Matrix&, bfloat16*, int64_t, int64_t, int64_t,
                   int) {}

#endif

}  // namespace
