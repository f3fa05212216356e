// Linear layers of bfloat16, where the CPU multiplies pairs of it (AVX512-BF16).
//
// Weights are packed once into panels of 64 outputs: [O / 64, C / 2, 64] pairs of neighbouring
// channels, zeros behind the last output and the last channel. A register block of up to ROWS rows
// goes through a panel from its first channel to its last, each output in one float32 sum: so the
// bits of a row depend neither on the other rows nor on who computed them.
//
// A panel comes from memory while the one before it is computed, since with a few dozen rows
// reading the weights takes as long as multiplying them. Pieces are taken as threads become free:
// one whose core does something else for a while keeps nobody waiting but for its own piece.

#pragma once

#include <omp.h>

#include "products.h"

namespace {

#ifdef __AVX512BF16__

constexpr bool HAS_LINEAR = true;
constexpr int PANEL = 64;  // outputs
constexpr int PANEL_VECTORS = PANEL / LANES;
constexpr int LINEAR_ROWS = 6;
constexpr int PIECES = 16;        // at least, if there are rows for them: 2 threads end together
constexpr int STRIDE = 8;         // channel pairs between two looks at what to fetch ahead

typedef Products<bfloat16> Pairs;

inline int64_t panels_of(int64_t outputs) { return (outputs + PANEL - 1) / PANEL; }

inline int64_t packed_elements(int64_t outputs, int64_t channels) {
    return panels_of(outputs) * PANEL * (channels + channels % 2);
}

// weight [O, C] to packed [panels_of(O), (C + 1) / 2, PANEL, 2].
inline void pack_linear(const bfloat16* weight, bfloat16* packed, int64_t outputs,
                        int64_t channels, int threads) {
    const int64_t pairs = (channels + 1) / 2;
#pragma omp parallel for num_threads(threads)
    for (int64_t panel = 0; panel < panels_of(outputs); ++panel)
        for (int64_t pair = 0; pair < pairs; ++pair)
            for (int lane = 0; lane < PANEL; ++lane)
                for (int half = 0; half < 2; ++half) {
                    const int64_t o = panel * PANEL + lane, c = 2 * pair + half;
                    packed[((panel * pairs + pair) * PANEL + lane) * 2 + half] =
                        o < outputs && c < channels ? weight[o * channels + c] : bfloat16{0};
                }
}

// What comes next from memory: `left` lines from `at` on, `each` per look.
struct Ahead {
    const char* at;
    int64_t left, each;

    void look() {
        for (int64_t i = 0; i < each && left > 0; ++i, --left, at += LINE)
            __builtin_prefetch(at, 0, 2);
    }
};

template <int COUNT>
void linear_block(const bfloat16* x, int64_t x_stride, const Bits* panel, int64_t channels,
                  Vec sum[COUNT][PANEL_VECTORS], Ahead& ahead) {
    for (int r = 0; r < COUNT; ++r)
        for (int v = 0; v < PANEL_VECTORS; ++v) sum[r][v] = all(0.0f);
    const int64_t whole = channels / 2;
    const auto multiply = [&](int64_t pair, const auto& pair_of) {
        for (int r = 0; r < COUNT; ++r) {
            const uint32_t row = pair_of(r);
            for (int v = 0; v < PANEL_VECTORS; ++v)
                sum[r][v] = Pairs::add(sum[r][v], panel[pair * PANEL_VECTORS + v], row);
        }
    };
    for (int64_t first = 0; first < whole; first += STRIDE) {
        ahead.look();
        for (int64_t pair = first; pair < std::min(first + STRIDE, whole); ++pair)
            multiply(pair, [&](int r) {
                uint32_t both;
                std::memcpy(&both, x + r * x_stride + 2 * pair, sizeof both);
                return both;
            });
    }
    if (channels % 2)
        multiply(whole, [&](int r) -> uint32_t { return x[r * x_stride + channels - 1].bits; });
}

template <int COUNT>
void linear_rows(const bfloat16* x, int64_t x_stride, const Bits* panel, int64_t channels,
                 const bfloat16* bias, bfloat16* out, int64_t outputs, int64_t first,
                 Ahead& ahead) {
    Vec sum[COUNT][PANEL_VECTORS];
    linear_block<COUNT>(x, x_stride, panel, channels, sum, ahead);
    for (int v = 0; v < PANEL_VECTORS; ++v) {
        const int64_t o = first + v * LANES;
        if (o >= outputs) break;
        for (int r = 0; r < COUNT; ++r)
            store_at(out + r * outputs, o, outputs,
                     bias ? sum[r][v] + load_at(bias, o, outputs) : sum[r][v]);
    }
}

// out [N, O] = x [N, C] times the packed weight's transpose, plus bias [O] unless it is null.
inline void linear(const bfloat16* x, int64_t x_stride, const bfloat16* packed,
                   const bfloat16* bias, bfloat16* out, int64_t rows, int64_t channels,
                   int64_t outputs, int threads) {
    const int64_t pairs = (channels + 1) / 2, panels = panels_of(outputs);
    const int64_t blocks = (rows + LINEAR_ROWS - 1) / LINEAR_ROWS;
    const int64_t splits = std::min(blocks, std::max<int64_t>(1, (PIECES + panels - 1) / panels));
    const int64_t looks = (channels / 2 + STRIDE - 1) / STRIDE;
    const int64_t lines = pairs * PANEL * 4 / LINE;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t piece = 0; piece < panels * splits; ++piece) {
        const int64_t panel = piece / splits, split = piece % splits;
        const Bits* weights = (const Bits*)(packed + panel * pairs * PANEL * 2);
        const int64_t begin = split * blocks / splits, end = (split + 1) * blocks / splits;
        // The panel that this thread will probably take next.
        const int64_t next = (piece + threads) / splits;
        Ahead ahead{(const char*)(packed + next * pairs * PANEL * 2), 0, 0};
        if (next != panel && next < panels) {
            ahead.left = lines;
            ahead.each = (lines + looks * (end - begin) - 1) / (looks * (end - begin));
        }
        for (int64_t block = begin; block < end; ++block) {
            const int64_t row = block * LINEAR_ROWS;
            const bfloat16* from = x + row * x_stride;
            bfloat16* to = out + row * outputs;
            const auto run = [&](auto kernel) {
                kernel(from, x_stride, weights, channels, bias, to, outputs, panel * PANEL, ahead);
            };
            switch (std::min<int64_t>(LINEAR_ROWS, rows - row)) {
                case 1: run(linear_rows<1>); break;
                case 2: run(linear_rows<2>); break;
                case 3: run(linear_rows<3>); break;
                case 4: run(linear_rows<4>); break;
                case 5: run(linear_rows<5>); break;
                default: run(linear_rows<LINEAR_ROWS>); break;
            }
        }
    }
}

#else

constexpr bool HAS_LINEAR = false;
inline int64_t packed_elements(int64_t, int64_t) { return 0; }
inline void pack_linear(const bfloat16*, bfloat16*, int64_t, int64_t, int) {}
inline void linear(const bfloat16*, int64_t, const bfloat16*, const bfloat16*, bfloat16*, int64_t,
                   int64_t, int64_t, int) {}

#endif

}  // namespace
