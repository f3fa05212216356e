// Where the keys and values of a token lie in the paged pool.

#pragma once

#include <cstdint>

namespace {

struct Cache {
    int64_t block_stride;  // elements from one block to the next: L * 2 * G * T * D
    int64_t offset;        // elements from a block's start to the layer's keys: layer * 2 * G * T * D
    int64_t head_stride;   // elements from one head to the next: T * D; in 8 bits, T scales more
    int64_t block_tokens, kv_heads, head_dim;

    // Elements from the pool's start to the key of one token in one head; int64 since a pool of
    // 2^31 elements is only 4 GiB of bfloat16.
    int64_t key(int64_t block, int64_t head, int64_t token) const {
        return block * block_stride + offset + head * head_stride + token * head_dim;
    }
    int64_t to_values() const { return kv_heads * head_stride; }

    // Where there are codes: the scale of that key, bfloat16, likewise from the pool's start.
    int64_t scale(int64_t block, int64_t head, int64_t token) const {
        return key(block, head, block_tokens) + token * 2;
    }
};

}  // namespace
