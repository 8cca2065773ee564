// Vectors of floats and of 32-bit words, as wide as the processor's: all else is written once, over these. The compiler
// gives them the operators of C++, lane by lane.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace harness {

using Word = std::uint32_t;
constexpr float LOG2_E = 1.44269504088896341f;

#ifdef __AVX512F__

constexpr int LANES = 16;  // floats, or words, in a vector
using Floats = __m512;
using Mask = __mmask16;

inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, Floats values) { _mm512_storeu_ps(to, values); }
inline void store(float* to, Mask lanes, Floats values) { _mm512_mask_storeu_ps(to, lanes, values); }
inline Floats every(float value) { return _mm512_set1_ps(value); }
inline Floats fma(Floats a, Floats b, Floats sum) { return _mm512_fmadd_ps(a, b, sum); }
inline float sum_of(Floats values) { return _mm512_reduce_add_ps(values); }
inline float max_of(Floats values) { return _mm512_reduce_max_ps(values); }

inline Mask first_lanes(int count) {
    return count >= LANES ? 0xffff : count <= 0 ? 0 : static_cast<Mask>((1u << count) - 1);
}
inline Mask higher(Mask lanes, Floats a, Floats b) { return _mm512_mask_cmp_ps_mask(lanes, a, b, _CMP_GT_OQ); }
inline Floats only(Mask lanes, Floats values) { return _mm512_maskz_mov_ps(lanes, values); }
inline Floats select(Mask lanes, Floats values, Floats others) { return _mm512_mask_mov_ps(others, lanes, values); }
inline Floats raise(Mask lanes, Floats values, Floats to) { return _mm512_mask_max_ps(values, lanes, values, to); }

inline Floats nearest(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// values x 2^power, for whole powers.
inline Floats scale(Floats values, Floats power) { return _mm512_scalef_ps(values, power); }

#else  // AVX2 and FMA

constexpr int LANES = 8;
using Floats = __m256;
using Mask = __m256;  // all bits of a lane, or none

inline Floats load(const float* from) { return _mm256_loadu_ps(from); }
inline void store(float* to, Floats values) { _mm256_storeu_ps(to, values); }
inline void store(float* to, Mask lanes, Floats values) { _mm256_maskstore_ps(to, _mm256_castps_si256(lanes), values); }
inline Floats every(float value) { return _mm256_set1_ps(value); }
inline Floats fma(Floats a, Floats b, Floats sum) { return _mm256_fmadd_ps(a, b, sum); }

inline float sum_of(Floats values) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
inline float max_of(Floats values) {
    __m128 top = _mm_max_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
    top = _mm_max_ps(top, _mm_movehl_ps(top, top));
    return _mm_cvtss_f32(_mm_max_ss(top, _mm_movehdup_ps(top)));
}

inline Mask first_lanes(int count) {
    const __m256i numbers = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count), numbers));
}
inline Mask higher(Mask lanes, Floats a, Floats b) { return _mm256_and_ps(lanes, _mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
inline Floats only(Mask lanes, Floats values) { return _mm256_and_ps(lanes, values); }
inline Floats select(Mask lanes, Floats values, Floats others) { return _mm256_blendv_ps(others, values, lanes); }
inline Floats raise(Mask lanes, Floats values, Floats to) { return select(lanes, _mm256_max_ps(values, to), values); }

inline Floats nearest(Floats x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// values x 2^power, for whole powers: 0 below -126, infinity above 127. What is no number stays none.
inline Floats scale(Floats values, Floats power) {
    const Floats limited = _mm256_min_ps(every(128), _mm256_max_ps(every(-127), power));
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(limited), _mm256_set1_epi32(127));
    return values * _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}

#endif

using Words = Word __attribute__((vector_size(4 * LANES)));

inline Words load(const Word* from) {
    Words words;
    std::memcpy(&words, from, sizeof words);
    return words;
}
inline void store(Word* to, Words words) { std::memcpy(to, &words, sizeof words); }
inline Words every(Word word) { return Words{} + word; }
inline Floats floats(Words words) { return (Floats)words; }  // the same bits
inline Words words(Floats floats) { return (Words)floats; }
// 0, 1, 2 and so on.
inline Words numbers() {
    Words numbers;
    for (int lane = 0; lane < LANES; ++lane) numbers[lane] = lane;
    return numbers;
}
inline Words select(Mask lanes, Words some, Words others) { return words(select(lanes, floats(some), floats(others))); }

// 2 to the power of each lane, relative error below 2e-7; lanes below -126 give 0 or next to it.
inline Floats exp2(Floats x) {
    const Floats whole = nearest(x), part = x - whole;
    Floats value = every(1.54035303933816e-4f);
    value = fma(value, part, every(1.33335581464284e-3f));
    value = fma(value, part, every(9.61812910762848e-3f));
    value = fma(value, part, every(5.55041086648216e-2f));
    value = fma(value, part, every(2.40226506959101e-1f));
    value = fma(value, part, every(6.93147180559945e-1f));
    value = fma(value, part, every(1.0f));
    return scale(value, whole);
}

inline Floats silu(Floats x) { return x / (every(1.0f) + exp2(x * every(-LOG2_E))); }

// GELU as it is approximated by tanh, which is a logistic function of twice as much.
inline Floats gelu(Floats x) {
    const Floats cubic = x * fma(x * x, every(0.044715f), every(1.0f));
    return x / (every(1.0f) + exp2(cubic * every(-2 * 0.797884560802865f * LOG2_E)));  // sqrt(2 / pi)
}

}  // namespace harness
