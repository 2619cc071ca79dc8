// SPDX-License-Identifier: Apache-2.0
// AVX512-VNNI: one vector holds a whole tile. See simd_avx2.h for what a Simd type offers.
#pragma once

#include "common.h"

#include <immintrin.h>

#include "unroll.h"

namespace flexquant {
namespace {

struct Avx512 {
  static constexpr int kLanes = 16;
  static constexpr int kFusedRows = 4;
  static constexpr int kGemmRows = 6;   // x 2 tiles: 12 integer accumulators
  static constexpr int kGemmTiles = 2;
  using I = __m512i;
  using F = __m512;

  static FQ_INLINE I load(const void* p) { return _mm512_loadu_si512(p); }
  static FQ_INLINE void store(void* p, I v) { _mm512_storeu_si512(p, v); }
  static FQ_INLINE I zero() { return _mm512_setzero_si512(); }
  static FQ_INLINE I add(I a, I b) { return _mm512_add_epi32(a, b); }
  template <int N>
  static FQ_INLINE I shift_right(I v) { return _mm512_srli_epi16(v, N); }
  template <int N>
  static FQ_INLINE I shift_left(I v) { return _mm512_slli_epi16(v, N); }
  static FQ_INLINE I mask(I v, uint8_t bits) { return _mm512_and_si512(v, _mm512_set1_epi8(static_cast<char>(bits))); }
  static FQ_INLINE I merge(I v, uint8_t bits, I code) {
    return _mm512_ternarylogic_epi32(v, _mm512_set1_epi8(static_cast<char>(bits)), code, 0xEA);  // (v & bits) | code
  }
  // Bits of `a` where `bits` has them, else of `b`.
  static FQ_INLINE I select(uint8_t bits, I a, I b) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi8(static_cast<char>(bits)), a, b, 0xCA);
  }
  static FQ_INLINE I quad(const int8_t* q) {
    int32_t value;
    __builtin_memcpy(&value, q, 4);
    return _mm512_set1_epi32(value);
  }
  template <bool kFull>
  static FQ_INLINE I dot(I sum, I code, I quad) { return _mm512_dpbusd_epi32(sum, code, quad); }
  template <bool kFull>
  static FQ_INLINE I finish(I sum, float) { return sum; }

  static FQ_INLINE F zero_f() { return _mm512_setzero_ps(); }
  static FQ_INLINE F set(float v) { return _mm512_set1_ps(v); }
  static FQ_INLINE F to_float(I v) { return _mm512_cvtepi32_ps(v); }
  static FQ_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
  static FQ_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static FQ_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static FQ_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static FQ_INLINE F load_f(const float* p) { return _mm512_loadu_ps(p); }
  static FQ_INLINE void store_f(float* p, F v) { _mm512_storeu_ps(p, v); }

  static FQ_INLINE __mmask16 first(int64_t count) {
    return count >= 16 ? __mmask16(0xFFFF) : count <= 0 ? __mmask16(0) : __mmask16((1u << count) - 1);
  }

  // Up to 16 elements of any dtype at element index `at`, as fp32; those past `count` are not read.
  template <Dtype D>
  static FQ_INLINE F load_as(const void* base, int64_t at, int64_t count = kLanes) {
    if constexpr (D == Dtype::kFloat) {
      return _mm512_maskz_loadu_ps(first(count), static_cast<const float*>(base) + at);
    } else {
      const __m256i half = _mm256_maskz_loadu_epi16(first(count), static_cast<const uint16_t*>(base) + at);
      if constexpr (D == Dtype::kHalf) return _mm512_cvtph_ps(half);
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
  }

  template <Dtype D>
  static FQ_INLINE void store_as(void* base, int64_t at, F value, int64_t count) {
    if constexpr (D == Dtype::kFloat) {
      _mm512_mask_storeu_ps(static_cast<float*>(base) + at, first(count), value);
    } else {
      __m256i half;
      if constexpr (D == Dtype::kHalf) {
        half = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      } else {
        half = to_bfloat16(value);
      }
      _mm256_mask_storeu_epi16(static_cast<uint16_t*>(base) + at, first(count), half);
    }
  }

  // Round to nearest even; NaN stays NaN.
  static FQ_INLINE __m256i to_bfloat16(F value) {
    const I bits = _mm512_castps_si512(value);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    I rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  }

  static FQ_INLINE I max_magnitude(I top, F v) {
    return _mm512_max_epi32(top, _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7FFFFFFF)));
  }
  static FQ_INLINE int32_t reduce_max(I v) { return _mm512_reduce_max_epi32(v); }
  static FQ_INLINE int32_t reduce_add(I v) { return _mm512_reduce_add_epi32(v); }
  static FQ_INLINE I round_to_int(F v) { return _mm512_cvtps_epi32(v); }
  static FQ_INLINE void store_int8(int8_t* p, I v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(v));
  }

  // For entropy.h.
  static FQ_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
  static FQ_INLINE float reduce_max(F v) { return _mm512_reduce_max_ps(v); }
  static FQ_INLINE float reduce_add(F v) { return _mm512_reduce_add_ps(v); }
  static FQ_INLINE F nearest(F v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static FQ_INLINE F scale_by_power(F v, F n) { return _mm512_scalef_ps(v, n); }
  static FQ_INLINE F keep_at_least(F v, F limit, F value) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(v, limit, _CMP_GE_OQ), value);
  }
  static FQ_INLINE F fill_past(F v, int64_t count, F fill) { return _mm512_mask_mov_ps(fill, first(count), v); }
};

}  // namespace
}  // namespace flexquant
