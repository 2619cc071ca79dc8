// SPDX-License-Identifier: Apache-2.0
// AVX2, with or without AVX-VNNI: two vectors hold a tile.
//
// A Simd type gives linear.h and entropy.h their vectors: `I` of kLanes int32 (or 4 kLanes bytes), `F` of
// kLanes fp32, and the shape of its register blocks. Every operation rounds as in IEEE 754, so that all
// instruction sets give the same bits. `dot<kFull>` adds sum(code * quad) of 4 bytes to each lane; kFull says
// that codes may have all 8 bits.
#pragma once

#include "common.h"

#include <immintrin.h>

#include "unroll.h"

namespace flexquant {
namespace {

template <bool kVnni>
struct Avx2 {
  static constexpr int kLanes = 8;
  static constexpr int kFusedRows = 2;
  static constexpr int kGemmRows = 4;
  static constexpr int kGemmTiles = 1;
  using I = __m256i;
  using F = __m256;

  static FQ_INLINE I load(const void* p) { return _mm256_loadu_si256(static_cast<const I*>(p)); }
  static FQ_INLINE void store(void* p, I v) { _mm256_storeu_si256(static_cast<I*>(p), v); }
  static FQ_INLINE I zero() { return _mm256_setzero_si256(); }
  static FQ_INLINE I add(I a, I b) { return _mm256_add_epi32(a, b); }
  template <int N>
  static FQ_INLINE I shift_right(I v) { return _mm256_srli_epi16(v, N); }
  template <int N>
  static FQ_INLINE I shift_left(I v) { return _mm256_slli_epi16(v, N); }
  static FQ_INLINE I mask(I v, uint8_t bits) { return _mm256_and_si256(v, _mm256_set1_epi8(static_cast<char>(bits))); }
  static FQ_INLINE I merge(I v, uint8_t bits, I code) { return _mm256_or_si256(mask(v, bits), code); }
  // Bits of `a` where `bits` has them, else of `b`.
  static FQ_INLINE I select(uint8_t bits, I a, I b) {
    const I mask = _mm256_set1_epi8(static_cast<char>(bits));
    return _mm256_or_si256(_mm256_and_si256(mask, a), _mm256_andnot_si256(mask, b));
  }
  static FQ_INLINE I quad(const int8_t* q) {
    int32_t value;
    __builtin_memcpy(&value, q, 4);
    return _mm256_set1_epi32(value);
  }

  template <bool kFull>
  static FQ_INLINE I dot(I sum, I code, I quad) {
    if constexpr (kVnni) {
      return _mm256_dpbusd_avx_epi32(sum, code, quad);
    } else if constexpr (kFull) {
      // 255 * 127 * 2 does not fit 16 bits: nibble by nibble.
      const I low = _mm256_maddubs_epi16(mask(code, 0x0F), quad);
      const I high = _mm256_maddubs_epi16(mask(shift_right<4>(code), 0x0F), quad);
      sum = add(sum, _mm256_madd_epi16(low, _mm256_set1_epi16(1)));
      return add(sum, _mm256_madd_epi16(high, _mm256_set1_epi16(16)));
    } else {
      return add(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(code, quad), _mm256_set1_epi16(1)));
    }
  }
  template <bool kFull>
  static FQ_INLINE I finish(I sum, float) { return sum; }

  static FQ_INLINE F zero_f() { return _mm256_setzero_ps(); }
  static FQ_INLINE F set(float v) { return _mm256_set1_ps(v); }
  static FQ_INLINE F to_float(I v) { return _mm256_cvtepi32_ps(v); }
  static FQ_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
  static FQ_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static FQ_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static FQ_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static FQ_INLINE F load_f(const float* p) { return _mm256_loadu_ps(p); }
  static FQ_INLINE void store_f(float* p, F v) { _mm256_storeu_ps(p, v); }

  // Up to 8 elements of any dtype at element index `at`, as fp32; those past `count` are not read.
  template <Dtype D>
  static FQ_INLINE F load_as(const void* base, int64_t at, int64_t count = kLanes) {
    constexpr int size = D == Dtype::kFloat ? 4 : 2;
    const char* source = static_cast<const char*>(base) + at * size;
    alignas(32) char part[32];
    if (count < kLanes) {
      __builtin_memset(part, 0, sizeof part);
      __builtin_memcpy(part, source, (count < 0 ? 0 : count) * size);
      source = part;
    }
    if constexpr (D == Dtype::kFloat) {
      return _mm256_loadu_ps(reinterpret_cast<const float*>(source));
    } else {
      const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
      if constexpr (D == Dtype::kHalf) return _mm256_cvtph_ps(half);
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    }
  }

  template <Dtype D>
  static FQ_INLINE void store_as(void* base, int64_t at, F value, int64_t count) {
    constexpr int size = D == Dtype::kFloat ? 4 : 2;
    alignas(32) char part[32];
    char* target = static_cast<char*>(base) + at * size;
    char* whole = count < kLanes ? part : target;
    if constexpr (D == Dtype::kFloat) {
      _mm256_storeu_ps(reinterpret_cast<float*>(whole), value);
    } else {
      __m128i half;
      if constexpr (D == Dtype::kHalf) {
        half = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
      } else {
        half = to_bfloat16(value);
      }
      _mm_storeu_si128(reinterpret_cast<__m128i*>(whole), half);
    }
    if (count < kLanes) __builtin_memcpy(target, part, (count < 0 ? 0 : count) * size);
  }

  // Round to nearest even; NaN stays NaN.
  static FQ_INLINE __m128i to_bfloat16(F value) {
    const I bits = _mm256_castps_si256(value);
    const I odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    I rounded = add(add(bits, _mm256_set1_epi32(0x7FFF)), odd);
    const I nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC00000), nan), 16);
    const I packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
    return _mm256_castsi256_si128(packed);
  }

  static FQ_INLINE I max_magnitude(I top, F v) {
    return _mm256_max_epi32(top, _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7FFFFFFF)));
  }
  static FQ_INLINE int32_t reduce_max(I v) {
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4E));
    return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xB1)));
  }
  static FQ_INLINE int32_t reduce_add(I v) {
    __m128i m = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    m = _mm_add_epi32(m, _mm_shuffle_epi32(m, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(m, _mm_shuffle_epi32(m, 0xB1)));
  }
  static FQ_INLINE I round_to_int(F v) { return _mm256_cvtps_epi32(v); }
  static FQ_INLINE void store_int8(int8_t* p, I v) {
    const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(half, half));
  }

  // For entropy.h.
  static FQ_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
  static FQ_INLINE float reduce_max(F v) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
  }
  static FQ_INLINE float reduce_add(F v) {
    __m128 m = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_add_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_add_ss(m, _mm_movehdup_ps(m)));
  }
  static FQ_INLINE F nearest(F v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // n is a whole number in [-126, 0].
  static FQ_INLINE F scale_by_power(F v, F n) {
    const I exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(v, _mm256_castsi256_ps(exponent));
  }
  static FQ_INLINE F keep_at_least(F v, F limit, F value) {
    return _mm256_and_ps(_mm256_cmp_ps(v, limit, _CMP_GE_OQ), value);
  }
  static FQ_INLINE F fill_past(F v, int64_t count, F fill) {
    const I lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const I past = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count < kLanes ? count : kLanes)), lane);
    return _mm256_blendv_ps(fill, v, _mm256_castsi256_ps(past));
  }
};

}  // namespace
}  // namespace flexquant
