// Matrix products of a few rows of activations with packed weights.
//
// Weights [columns, depth] are cut into panels of two vectors of columns, each laid out [depth words][columns], so that
// the kernel reads them in order. Activations [rows, depth] are cut into tiles of a few rows, each [depth words][rows].
// A tile's rows x 2 vectors of columns are the sums that stay in registers: 28 of AVX-512's 32, 12 of AVX2's 16. With AMX
// a tile is 32 rows, each [depth words], and its sums fill four of AMX's registers.
#pragma once

#include <omp.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <utility>
#include <vector>

#include "amx.h"
#include "element.h"

namespace harness {

constexpr int PANEL = 2 * LANES;  // columns
#ifdef __AMX_BF16__
constexpr bool AMX = true;
constexpr int TILE = 32;  // rows, at most
#else
constexpr bool AMX = false;
constexpr int TILE = LANES == 16 ? 14 : 6;
#endif
constexpr int LINE = 16;  // words in a line of the processor's cache

// Words of a tile that a word of weights is multiplied by.
template <class E>
constexpr int PARTS = E::STEP / E::HELD;
// Rows of a tile, at most, whose sums for four vectors of columns stay in registers beside all else.
template <class E>
constexpr int LOW = AMX ? TILE / 2 : TILE / (PARTS<E> + 1);

inline int panels_of(int columns) { return (columns + PANEL - 1) / PANEL; }

// How a number of rows is cut into tiles: as equal as can be, or with AMX, where 17 rows cost what 32 do, all full but
// the last.
struct Tiling {
    int rows, tiles, low, extra;  // the first `extra` tiles have low + 1 rows, the others `low`

    explicit Tiling(int rows = 0) : rows(rows), tiles((rows + TILE - 1) / TILE) {
        low = AMX ? TILE : tiles ? rows / tiles : 0;
        extra = AMX ? 0 : tiles ? rows % tiles : 0;
    }
    int start(int tile) const { return tile * low + (tile < extra ? tile : extra); }
    int height(int tile) const {
        const int full = low + (tile < extra), left = rows - start(tile);
        return full < left ? full : left;
    }
    int tile_of(int row) const {
        const int split = extra * (low + 1);
        return row < split ? row / (low + 1) : extra + (row - split) / low;
    }
};

// Where the words of one row of activations stand: word k is at base[k * stride].
struct RowWords {
    Word* base;
    int stride;
};

// Row r of a tile of so many rows, each of so many words.
inline RowWords row_of_tile(Word* tile, int row, int rows, int words) {
    if (AMX) return {tile + static_cast<std::size_t>(row) * words, 1};
    return {tile + row, rows};
}

inline RowWords row_words(Word* tiles, const Tiling& tiling, int row, int words) {
    const int tile = tiling.tile_of(row), start = tiling.start(tile);
    return row_of_tile(tiles + static_cast<std::size_t>(start) * words, row - start, tiling.height(tile), words);
}

// Puts a vector of values of a row, elements `at`.. of it, into its tile.
template <class E>
inline void put(const RowWords& row, int at, Floats values) {
    if (AMX) return E::hold(row.base + at / E::HELD, values);
    alignas(64) Word words[LANES];
    E::hold(words, values);
    Word* to = row.base + static_cast<std::size_t>(at / E::HELD) * row.stride;
    for (int i = 0; i < LANES / E::HELD; ++i) to[static_cast<std::size_t>(i) * row.stride] = words[i];
}

// sums[ROWS][VECTORS * LANES] (+)= tile[words * PARTS][ROWS] x columns[words][width]. With FETCH it asks meanwhile for
// as much memory from `soon` on as it reads of the columns. `apart` is between rows that stand one after the other.
#ifdef __AMX_BF16__
template <class E, int ROWS, int VECTORS, bool ADD, bool FETCH>
void product(const Word* tile, int apart, const Word* columns, int width, int words, float* sums, int leading,
             const Word* soon) {
    amx_product_of_any<(ROWS > SIDE), VECTORS, ADD, FETCH>(tile, apart, ROWS, columns, width, words, sums, leading, soon);
}
#else
template <class E, int ROWS, int VECTORS, bool ADD, bool FETCH>
void product(const Word* tile, int apart, const Word* columns, int width, int words, float* sums, int leading,
             const Word* soon) {
    Floats sum[ROWS][VECTORS];
#pragma GCC unroll 14
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v)
            sum[r][v] = ADD ? load(sums + r * leading + v * LANES) : Floats{};
    for (int k = 0; k < words; ++k) {
#pragma GCC unroll 2
        for (int part = 0; part < PARTS<E>; ++part) {
            Words column[VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) {
                column[v] = E::part(load(columns + v * LANES), part);
                if (FETCH && !part && v * LANES % LINE == 0)
                    _mm_prefetch(reinterpret_cast<const char*>(soon + v * LANES), _MM_HINT_T1);
            }
#pragma GCC unroll 14
            for (int r = 0; r < ROWS; ++r) {
                const Words value = every(tile[r]);
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; ++v) sum[r][v] = E::dot(sum[r][v], value, column[v]);
            }
            tile += ROWS;
        }
        if (FETCH) soon += VECTORS * LANES;
        columns += width;
    }
#pragma GCC unroll 14
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) store(sums + r * leading + v * LANES, sum[r][v]);
}
#endif

using Product = void (*)(const Word*, int, const Word*, int, int, float*, int, const Word*);

template <class E, int VECTORS, bool ADD, bool FETCH, int... ROWS>
constexpr std::array<Product, sizeof...(ROWS) + 1> products(std::integer_sequence<int, ROWS...>) {
    return {nullptr, &product<E, ROWS + 1, VECTORS, ADD, FETCH>...};
}

// The product for a tile's height and a number of vectors, four of them for a low tile alone.
template <class E, bool ADD, bool FETCH>
inline Product product_of(int rows, int vectors) {
    static constexpr auto one = products<E, 1, ADD, FETCH>(std::make_integer_sequence<int, TILE>());
    static constexpr auto two = products<E, 2, ADD, FETCH>(std::make_integer_sequence<int, TILE>());
    static constexpr auto four = products<E, 4, ADD, FETCH>(std::make_integer_sequence<int, LOW<E>>());
    return vectors == 4 ? four[rows] : vectors == 2 ? two[rows] : one[rows];
}

// Packed weights [columns, depth].
struct Weights {
    const Word* packed;
    int panels, words;
};

// The first of a thread's part of `count` things, in order, that a team shares.
inline int part_of(int count, int thread, int threads) {
    return static_cast<int>(static_cast<std::int64_t>(count) * thread / threads);
}

// Hands out the tasks of products one by one: to each thread first those of the panels that it packed, whose memory is
// near it where there are several NUMA nodes, then what the threads after it have left.
class Tasks {
public:
    // Before a team's first product.
    void begin(int threads) {
        if (static_cast<int>(threads_.size()) < threads) threads_ = std::vector<Thread>(threads);
        for (Thread& thread : threads_) {
            thread.turn = 0;
            for (auto& next : thread.next) next = 0;
        }
    }
    // Calls work(panel, split) for each; called by all threads of a team together, ends with a barrier.
    template <class Work>
    void each(int panels, int splits, Work&& work) {
        const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        Thread& own = threads_[thread];
        const int turn = own.turn;
        own.turn ^= 1;
        own.next[own.turn] = 0;  // of the next product: nobody is in the last one any more
        for (int i = 0; i < threads; ++i) {
            const int owner = thread + i < threads ? thread + i : thread + i - threads;
            const int first = part_of(panels, owner, threads), count = part_of(panels, owner + 1, threads) - first;
            std::atomic<int>& next = threads_[owner].next[turn];
            while (next.load(std::memory_order_relaxed) < count * splits) {
                const int task = next.fetch_add(1, std::memory_order_relaxed);
                if (task < count * splits) work(first + task / splits, task % splits);
            }
        }
#pragma omp barrier
    }

private:
    struct alignas(64) Thread {
        std::atomic<int> next[2] = {0, 0};  // its first task that nobody has taken, in every other product
        int turn = 0;
    };
    std::vector<Thread> threads_;
};

// Activations that the last cache does not keep until the next panel needs them are read from memory for each: then a
// task takes several panels, and of all that it multiplies so many words at a time that their rows stay in L2.
constexpr int GROUP_PANELS = 8, GROUP_ROWS = 256, GROUP_WORDS = 256;
// Bytes of activations from which on that pays: measured, with a last cache of 32 MiB. What sysconf() says of that cache
// is of no use: there, 256 MiB.
#ifndef HARNESS_MANY_BYTES
#define HARNESS_MANY_BYTES (8 << 20)
#endif

// Computes all columns of `tiles` x weights; calls done(sums[height][PANEL], first row, height, panel) for each block of
// them. All threads of a team call it together; it ends with a barrier. Each sum is added up in the order of its words.
template <class E, class Done>
void multiply(const Weights& weights, const Word* tiles, const Tiling& tiling, Tasks& tasks, Done&& done) {
    if (!tiling.tiles) return;
    const int panels = weights.panels, words = weights.words, tile_words = words * PARTS<E>;
    const int wish = 8 * omp_get_num_threads();  // enough tasks for all threads to end together
    const auto part = [&](int tile, int panel, int from, int count, float* sums) {
        const int start = tiling.start(tile), height = tiling.height(tile);
        const Word* rows = tiles + static_cast<std::size_t>(start) * tile_words;
        const Word* columns = weights.packed + (static_cast<std::size_t>(panel) * words + from) * PANEL;
        const Product of = from ? product_of<E, true, false>(height, 2) : product_of<E, false, false>(height, 2);
        of(rows + static_cast<std::size_t>(from) * PARTS<E> * height, tile_words, columns, PANEL, count, sums, PANEL, nullptr);
        if (from + count == words) done(sums, start, height, panel);
    };
    const int group = std::min(GROUP_PANELS, panels / wish);
    // Not with AMX, on which it was never measured.
    if (!AMX && group > 1 && static_cast<std::size_t>(tiling.rows) * tile_words * sizeof(Word) >= HARNESS_MANY_BYTES) {
        tasks.each((panels + group - 1) / group, 1, [&](int task, int) {
            constexpr int TOGETHER = GROUP_ROWS / TILE;
            alignas(64) float sums[GROUP_PANELS][TOGETHER][TILE * PANEL];
            const int first = task * group, last = std::min(panels, first + group);
            for (int begin = 0; begin < tiling.tiles; begin += TOGETHER)
                for (int from = 0; from < words; from += GROUP_WORDS)
                    for (int panel = first; panel < last; ++panel)
                        for (int tile = begin; tile < std::min(tiling.tiles, begin + TOGETHER); ++tile)
                            part(tile, panel, from, std::min(GROUP_WORDS, words - from),
                                 sums[panel - first][tile - begin]);
        });
        return;
    }
    const int splits = std::min(std::max(1, (wish + panels - 1) / panels), tiling.tiles);
    tasks.each(panels, splits, [&](int panel, int split) {
        alignas(64) float sums[TILE * PANEL];
        const int last = tiling.tiles * (split + 1) / splits;
        for (int tile = tiling.tiles * split / splits; tile < last; ++tile) part(tile, panel, 0, words, sums);
    });
}

}  // namespace harness
