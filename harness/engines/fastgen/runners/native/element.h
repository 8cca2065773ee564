// What a kernel needs to know of an element type. Weights and the cache are kept in 32-bit words: one float32, or two
// bfloat16 that follow each other along the summed dimension. What they are multiplied by, activations in tiles, is
// kept in such words too, or one element a word.
#pragma once

#include <cstddef>

#include "vector.h"

namespace harness {

struct Float32 {
    using Raw = float;
    static constexpr int STEP = 1;  // elements in a word of weights
    static constexpr int HELD = 1;  // elements in a word of a tile

    // The elements of words of weights that stand in words `part` of STEP / HELD of a tile.
    static inline Words part(Words words, int) { return words; }
    static inline Floats dot(Floats sum, Words a, Words b) { return fma(floats(a), floats(b), sum); }
    static inline Floats load(const Raw* from) { return harness::load(from); }
    static inline void store(Raw* to, Floats values) { harness::store(to, values); }
    // Stores LANES values as LANES / HELD words of a tile.
    static inline void hold(Word* to, Floats values) { harness::store(to, words(values)); }
    // Word `at` of a tile's row, of elements as they are stored.
    static inline Word held(const Raw* from, int at) {
        Word word;
        std::memcpy(&word, from + at, sizeof word);
        return word;
    }
};

#ifdef __AVX512BF16__

// Two products at once, by AVX512-BF16.
struct BFloat16 {
    using Raw = std::uint16_t;
    static constexpr int STEP = 2;
    static constexpr int HELD = 2;

    static inline Words part(Words words, int) { return words; }
    static inline Floats dot(Floats sum, Words a, Words b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
    static inline Floats load(const Raw* from) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
        return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
    static inline void store(Raw* to, Floats values) {
        const __m256bh narrow = _mm512_cvtneps_pbh(values);
        std::memcpy(to, &narrow, sizeof narrow);
    }
    static inline void hold(Word* to, Floats values) { store(reinterpret_cast<Raw*>(to), values); }
    static inline Word held(const Raw* from, int at) {
        Word word;
        std::memcpy(&word, from + at * HELD, sizeof word);
        return word;
    }
};

#else

// Computed in float32, of which a bfloat16 is the upper half: tiles hold floats, and each word of weights is multiplied
// in two parts.
struct BFloat16 {
    using Raw = std::uint16_t;
    using Raws = Raw __attribute__((vector_size(2 * LANES)));
    static constexpr int STEP = 2;
    static constexpr int HELD = 1;

    static inline Words part(Words words, int part) { return part ? words & 0xffff0000 : words << 16; }
    // Not fma(), after which the compiler may put the sum into the register of a factor: with all registers in use, g++
    // then keeps sums in memory.
    static inline Floats dot(Floats sum, Words a, Words b) {
        asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
        return sum;
    }
    static inline Floats load(const Raw* from) {
        Raws raw;
        std::memcpy(&raw, from, sizeof raw);
        return floats(__builtin_convertvector(raw, Words) << 16);
    }
    static inline void store(Raw* to, Floats values) {
        const Raws raw = __builtin_convertvector(rounded(values) >> 16, Raws);
        std::memcpy(to, &raw, sizeof raw);
    }
    static inline void hold(Word* to, Floats values) { harness::store(to, rounded(values) & 0xffff0000); }
    static inline Word held(const Raw* from, int at) { return static_cast<Word>(from[at]) << 16; }

private:
    // Has the nearest bfloat16 in each lane's upper half, of two equally near the even one, as AVX512-BF16 rounds.
    static inline Words rounded(Floats values) {
        const Words bits = words(values);
        return values == values ? bits + 0x7fff + ((bits >> 16) & 1) : bits | 0x400000;
    }
};

#endif

}  // namespace harness
