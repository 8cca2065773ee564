// Attention of a ragged batch over the paged cache.
//
// A block of the cache holds, for each key-value head, keys as [head_dim words][block_size] and values as
// [block_size words][head_dim]: the layout of a panel of weights, so that both products run through the same kernel.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "matrix.h"

namespace harness {

constexpr int MAX_HEAD_DIM = 256;
constexpr int GROUP = 256;  // keys scored before their values are read; a block is at most as long

struct Shape {
    int heads, kv_heads, head_dim, block_size;
    float scaling;
};

// One layer's part of the cache: [blocks][kv_heads][head_words] words each.
struct Cache {
    Word *keys, *values;
    std::size_t head_words;  // of one head in a block
    int kv_heads;

    std::size_t at(int block, int head) const {
        return (static_cast<std::size_t>(block) * kv_heads + head) * head_words;
    }
};

// Consecutive tokens of one sequence: rows `row`.. of the pass, positions `start`.. of the sequence.
struct Chunk {
    int row, start, length;
    const std::int32_t* blocks;
};

// Some rows (token, query head of the group) of a chunk, for one key-value head.
struct Task {
    int chunk, kv_head, first, rows;
};

inline void plan(const std::vector<Chunk>& chunks, const Shape& shape, std::vector<Task>& tasks) {
    tasks.clear();
    const int group = shape.heads / shape.kv_heads;
    for (std::size_t c = 0; c < chunks.size(); ++c) {
        const Tiling tiling(chunks[c].length * group);
        for (int head = 0; head < shape.kv_heads; ++head)
            for (int tile = tiling.tiles - 1; tile >= 0; --tile)  // the longest first
                tasks.push_back({static_cast<int>(c), head, tiling.start(tile), tiling.height(tile)});
    }
}

// sums[rows][count] (+)= tile[words][rows] x columns[words][width], for any number of columns up to the next vector.
// Decodes read each block once, from memory, and the processor's own prefetching loses its way between blocks: hence
// `soon`, what will be read next.
template <class E, bool ADD>
inline void wide_product(const Word* tile, int rows, int apart, const Word* columns, int width, int words, int count, float* sums,
                         int leading, const Word* soon) {
    const int vectors = (count + LANES - 1) / LANES, most = rows <= LOW<E> ? 4 : 2;
    for (int v = 0; v < vectors;) {
        const int left = vectors - v, take = left >= most ? most : left >= 2 ? 2 : 1;
        product_of<E, ADD, true>(rows, take)(tile, apart, columns + v * LANES, width, words, sums + v * LANES, leading,
                                             soon);
        soon += static_cast<std::size_t>(words) * take * LANES;
        v += take;
    }
}

// query: [tokens, heads * head_dim]; the result goes to the tiles of the output projection.
template <class E>
void attend(const Task& task, const Chunk& chunk, const Shape& shape, const Cache& cache,
            const typename E::Raw* query, Word* out, const Tiling& tiling) {
    const int group = shape.heads / shape.kv_heads, dim = shape.head_dim, rows = task.rows;
    const int width = shape.heads * dim, held = dim / E::HELD, block_size = shape.block_size;
    const float factor = shape.scaling * LOG2_E;

    alignas(64) Word packed[MAX_HEAD_DIM * TILE];
    alignas(64) float scores[TILE * GROUP];
    alignas(64) Word weights[GROUP * TILE];
    alignas(64) float sums[TILE * MAX_HEAD_DIM];
    float peak[TILE], total[TILE];
    int visible[TILE], row_of[TILE], column[TILE];
    for (int r = 0; r < rows; ++r) {
        const int token = (task.first + r) / group, head = task.kv_head * group + (task.first + r) % group;
        visible[r] = chunk.start + token + 1;
        row_of[r] = chunk.row + token;
        column[r] = head * dim;
        const typename E::Raw* from = query + static_cast<std::size_t>(row_of[r]) * width + column[r];
        const RowWords to = row_of_tile(packed, r, rows, held);
        for (int k = 0; k < held; ++k) to.base[k * to.stride] = E::held(from, k);
        peak[r] = -std::numeric_limits<float>::infinity();
        total[r] = 0;
        std::memset(sums + r * MAX_HEAD_DIM, 0, dim * sizeof(float));
    }
    const int end = visible[rows - 1], stride = GROUP / block_size * block_size;
    for (int begin = 0; begin < end; begin += stride) {
        const int count = std::min(end - begin, stride);
        const std::int32_t* block = chunk.blocks + begin / block_size;
        for (int at = 0, b = 0; at < count; at += block_size, ++b) {
            const int here = std::min(count - at, block_size);
            const bool more = at + block_size < count;
            const Word* soon = (more ? cache.keys : cache.values) + cache.at(block[more ? b + 1 : 0], task.kv_head);
            wide_product<E, false>(packed, rows, held, cache.keys + cache.at(block[b], task.kv_head), block_size,
                                   dim / E::STEP, here, scores + at, GROUP, soon);
        }
        const int vectors = (count + LANES - 1) / LANES;
        for (int r = 0; r < rows; ++r) {
            const float* row = scores + r * GROUP;
            const int seen = visible[r] - begin;
            const RowWords to = row_of_tile(weights, r, rows, GROUP / E::HELD);
            Floats most = every(peak[r]);
            for (int v = 0; v < vectors && v * LANES < seen; ++v)
                most = raise(first_lanes(seen - v * LANES), most, load(row + v * LANES));
            const float top = max_of(most);
            const Floats tops = every(top), factors = every(factor);
            Floats sum{};
            for (int v = 0; v < vectors; ++v) {
                const Floats distance = (load(row + v * LANES) - tops) * factors;
                const Floats weight = only(first_lanes(seen - v * LANES), exp2(distance));
                sum += weight;
                put<E>(to, v * LANES, weight);
            }
            const float fade = top > peak[r] ? exp2f((peak[r] - top) * factor) : 1.0f;
            total[r] = total[r] * fade + sum_of(sum);
            if (begin && fade != 1.0f)
                for (int d = 0; d < dim; d += LANES) {
                    float* at = sums + r * MAX_HEAD_DIM + d;
                    store(at, load(at) * every(fade));
                }
            peak[r] = top;
        }
        for (int at = 0, b = 0; at < count; at += block_size, ++b) {
            const int words = (std::min(count - at, block_size) + E::STEP - 1) / E::STEP;
            const bool more = at + block_size < count, ends = !more && begin + stride >= end;
            const Word* soon = (more || ends ? cache.values : cache.keys) + cache.at(block[ends ? b : b + 1], task.kv_head);
            wide_product<E, true>(weights + static_cast<std::size_t>(at / E::HELD) * (AMX ? 1 : rows), rows, GROUP / E::HELD,
                                  cache.values + cache.at(block[b], task.kv_head), dim, words, dim, sums, MAX_HEAD_DIM,
                                  soon);
        }
    }
    for (int r = 0; r < rows; ++r) {
        const RowWords to = row_words(out, tiling, row_of[r], width / E::HELD);
        const Floats whole = every(1.0f / total[r]);
        for (int d = 0; d < dim; d += LANES) put<E>(to, column[r] + d, load(sums + r * MAX_HEAD_DIM + d) * whole);
    }
}

// Asks for the lines that remember() is going to write for a token: they are scattered, and rarely in a cache.
template <class E>
inline void fetch_place(const Shape& shape, int block, int offset, const Cache& cache) {
    const int dim = shape.head_dim;
    for (int head = 0; head < shape.kv_heads; ++head) {
        const std::size_t where = cache.at(block, head);
        const Word* key = cache.keys + where + offset;
        const Word* value = cache.values + where + static_cast<std::size_t>(offset / E::STEP) * dim;
        for (int w = 0; w < dim / E::STEP; ++w, key += shape.block_size) __builtin_prefetch(key, 1);
        for (int w = 0; w < dim; w += LANES) __builtin_prefetch(value + w, 1);
    }
}

// Stores one token's keys and values [kv_heads * head_dim], float32, into its place in the cache.
template <class E>
void remember(const float* key, const float* value, const Shape& shape, int block, int offset, const Cache& cache) {
    using Raw = typename E::Raw;
    const int dim = shape.head_dim;
    for (int head = 0; head < shape.kv_heads; ++head) {
        const std::size_t where = cache.at(block, head);
        Word* key_words = cache.keys + where + offset;
        Raw* value_row = reinterpret_cast<Raw*>(cache.values + where + static_cast<std::size_t>(offset / E::STEP) * dim);
        for (int d = 0; d < dim; d += LANES) {
            alignas(64) Raw narrow[LANES];
            E::store(narrow, load(key + head * dim + d));
            for (int i = 0; i < LANES / E::STEP; ++i)
                std::memcpy(key_words + static_cast<std::size_t>(d / E::STEP + i) * shape.block_size,
                            narrow + i * E::STEP, sizeof(Word));
            E::store(narrow, load(value + head * dim + d));
            for (int i = 0; i < LANES; ++i) value_row[(d + i) * E::STEP + offset % E::STEP] = narrow[i];
        }
    }
}

}  // namespace harness
