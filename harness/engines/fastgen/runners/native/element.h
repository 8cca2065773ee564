// What a kernel needs to know of an element type. Matrices are read in 32-bit words: one float32, or two bfloat16
// that follow each other along the summed dimension, which is how AVX512-BF16's dot product takes them.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace harness {

using Word = std::uint32_t;
constexpr int LANES = 16;  // floats, or words, in a vector
constexpr float LOG2_E = 1.44269504088896341f;

struct Float32 {
    using Raw = float;
    static constexpr int STEP = 1;  // elements in a word

    static inline __m512 dot(__m512 sum, __m512i a, __m512i b) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
    }
    static inline __m512 load(const Raw* from) { return _mm512_loadu_ps(from); }
    static inline void store(Raw* to, __m512 values) { _mm512_storeu_ps(to, values); }
};

#ifdef __AVX512BF16__
struct BFloat16 {
    using Raw = std::uint16_t;
    static constexpr int STEP = 2;

    static inline __m512 dot(__m512 sum, __m512i a, __m512i b) {
        return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
    }
    static inline __m512 load(const Raw* from) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
        return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
    static inline void store(Raw* to, __m512 values) {
        const __m256bh narrow = _mm512_cvtneps_pbh(values);
        std::memcpy(to, &narrow, sizeof narrow);
    }
};
#endif

inline __mmask16 first_lanes(int count) {
    return count >= LANES ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

// 2 to the power of each lane, relative error below 2e-7; lanes below -126 give 0 or next to it.
inline __m512 exp2(__m512 x) {
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 part = _mm512_sub_ps(x, whole);
    __m512 value = _mm512_set1_ps(1.54035303933816e-4f);
    value = _mm512_fmadd_ps(value, part, _mm512_set1_ps(1.33335581464284e-3f));
    value = _mm512_fmadd_ps(value, part, _mm512_set1_ps(9.61812910762848e-3f));
    value = _mm512_fmadd_ps(value, part, _mm512_set1_ps(5.55041086648216e-2f));
    value = _mm512_fmadd_ps(value, part, _mm512_set1_ps(2.40226506959101e-1f));
    value = _mm512_fmadd_ps(value, part, _mm512_set1_ps(6.93147180559945e-1f));
    value = _mm512_fmadd_ps(value, part, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(value, whole);
}

}  // namespace harness
