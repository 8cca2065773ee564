// Matrix products by AMX: eight tiles of 16 rows of 64 bytes, of which four hold sums.
//
// Activations are kept row after row here, for that is how AMX takes them; columns, as packed weights and the cache hold
// them, are already pairs of bfloat16 along the summed dimension.
#pragma once

#ifdef __AMX_BF16__

#include <sys/syscall.h>
#include <unistd.h>

#include "element.h"

namespace harness {

constexpr int SIDE = 16;  // rows of an AMX tile, and words in one

// Asks the kernel to let this process use AMX's registers; it does so where it can save them.
inline bool allow_amx() {
    constexpr long ASK = 0x1023, REGISTERS = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, ASK, REGISTERS) == 0;
}

// The shape of a thread's tiles, for as long as this lives; whoever had another gets it back.
class AmxTiles {
public:
    AmxTiles() {
        _tile_storeconfig(&before_);
        Shape shape{};
        shape.palette = 1;
        for (int tile = 0; tile < 8; ++tile) {
            shape.row_bytes[tile] = 4 * SIDE;
            shape.rows[tile] = SIDE;
        }
        _tile_loadconfig(&shape);
    }
    ~AmxTiles() {
        if (before_.palette)
            _tile_loadconfig(&before_);
        else
            _tile_release();
    }
    AmxTiles(const AmxTiles&) = delete;
    AmxTiles& operator=(const AmxTiles&) = delete;

private:
    struct alignas(64) Shape {  // as the processor reads it
        std::uint8_t palette, start_row, unused[14];
        std::uint16_t row_bytes[16];
        std::uint8_t rows[16];
    };
    Shape before_;
};

// sums[SIDE * (1 + HIGH)][VECTORS * 16] (+)= rows[..][words] x columns[words][width], for whole sixteens of words. What
// lies behind the last row is read too, and its sums are of no use.
template <bool HIGH, int VECTORS, bool ADD, bool FETCH>
inline void amx_product(const Word* rows, int stride, const Word* columns, int width, int words, float* sums,
                        int leading, const Word* soon) {
    static_assert(VECTORS == 1 || VECTORS == 2 || (VECTORS == 4 && !HIGH));
    const int across = 4 * leading, along = 4 * stride, down = 4 * width;
    float* high_sums = sums + SIDE * leading;
    // Tiles 0 to 3 hold sums, 4 and 5 rows, 6 and 7 columns.
    if constexpr (ADD) {
        _tile_loadd(0, sums, across);
        if constexpr (VECTORS > 1) _tile_loadd(1, sums + SIDE, across);
        if constexpr (VECTORS > 2) _tile_loadd(2, sums + 2 * SIDE, across);
        if constexpr (VECTORS > 2) _tile_loadd(3, sums + 3 * SIDE, across);
        if constexpr (HIGH) _tile_loadd(2, high_sums, across);
        if constexpr (HIGH && VECTORS > 1) _tile_loadd(3, high_sums + SIDE, across);
    } else {
        _tile_zero(0);
        if constexpr (VECTORS > 1) _tile_zero(1);
        if constexpr (HIGH || VECTORS > 2) _tile_zero(2);
        if constexpr ((HIGH && VECTORS > 1) || VECTORS > 2) _tile_zero(3);
    }
    for (int k = 0; k < words; k += SIDE) {
        _tile_loadd(4, rows + k, along);
        if constexpr (HIGH) _tile_loadd(5, rows + SIDE * stride + k, along);
        _tile_loadd(6, columns, down);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (HIGH) _tile_dpbf16ps(2, 5, 6);
        if constexpr (VECTORS > 1) {
            _tile_loadd(7, columns + SIDE, down);
            _tile_dpbf16ps(1, 4, 7);
            if constexpr (HIGH) _tile_dpbf16ps(3, 5, 7);
        }
        if constexpr (VECTORS > 2) {
            _tile_loadd(6, columns + 2 * SIDE, down);
            _tile_dpbf16ps(2, 4, 6);
            _tile_loadd(7, columns + 3 * SIDE, down);
            _tile_dpbf16ps(3, 4, 7);
        }
        if constexpr (FETCH) {
            for (int line = 0; line < SIDE * VECTORS; ++line)
                _mm_prefetch(reinterpret_cast<const char*>(soon + line * SIDE), _MM_HINT_T1);
            soon += SIDE * SIDE * VECTORS;
        }
        columns += static_cast<std::size_t>(SIDE) * width;
    }
    _tile_stored(0, sums, across);
    if constexpr (VECTORS > 1) _tile_stored(1, sums + SIDE, across);
    if constexpr (VECTORS > 2) _tile_stored(2, sums + 2 * SIDE, across);
    if constexpr (VECTORS > 2) _tile_stored(3, sums + 3 * SIDE, across);
    if constexpr (HIGH) _tile_stored(2, high_sums, across);
    if constexpr (HIGH && VECTORS > 1) _tile_stored(3, high_sums + SIDE, across);
}

// The same for any number of words: the last ones, fewer than 16, by vectors.
template <bool HIGH, int VECTORS, bool ADD, bool FETCH>
void amx_product_of_any(const Word* rows, int stride, int count, const Word* columns, int width, int words, float* sums,
                        int leading, const Word* soon) {
    const int whole = words / SIDE * SIDE;
    amx_product<HIGH, VECTORS, ADD, FETCH>(rows, stride, columns, width, whole, sums, leading, soon);
    if (whole == words) return;
    columns += static_cast<std::size_t>(whole) * width;
    for (int r = 0; r < count; ++r)
        for (int v = 0; v < VECTORS; ++v) {
            float* at = sums + r * leading + v * LANES;
            Floats sum = load(at);
            for (int k = whole; k < words; ++k)
                sum = BFloat16::dot(sum, every(rows[r * stride + k]), load(columns + (k - whole) * width + v * LANES));
            store(at, sum);
        }
}

}  // namespace harness

#endif
