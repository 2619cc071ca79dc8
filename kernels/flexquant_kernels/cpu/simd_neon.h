// SPDX-License-Identifier: Apache-2.0
// NEON with the dot product of Armv8.2: four vectors hold a tile. See simd_avx2.h for what a Simd type offers.
#pragma once

#include "common.h"

#include <arm_neon.h>

#include "unroll.h"

namespace flexquant {
namespace {

struct Neon {
  static constexpr int kLanes = 4;
  static constexpr int kFusedRows = 2;
  static constexpr int kGemmRows = 4;
  static constexpr int kGemmTiles = 1;
  using I = int32x4_t;
  using F = float32x4_t;

  static FQ_INLINE uint8x16_t bytes(I v) { return vreinterpretq_u8_s32(v); }
  static FQ_INLINE I words(uint8x16_t v) { return vreinterpretq_s32_u8(v); }

  static FQ_INLINE I load(const void* p) { return words(vld1q_u8(static_cast<const uint8_t*>(p))); }
  static FQ_INLINE void store(void* p, I v) { vst1q_u8(static_cast<uint8_t*>(p), bytes(v)); }
  static FQ_INLINE I zero() { return vdupq_n_s32(0); }
  static FQ_INLINE I add(I a, I b) { return vaddq_s32(a, b); }
  template <int N>
  static FQ_INLINE I shift_right(I v) { return words(vshrq_n_u8(bytes(v), N)); }
  template <int N>
  static FQ_INLINE I shift_left(I v) { return words(vshlq_n_u8(bytes(v), N)); }
  static FQ_INLINE I mask(I v, uint8_t bits) { return words(vandq_u8(bytes(v), vdupq_n_u8(bits))); }
  static FQ_INLINE I merge(I v, uint8_t bits, I code) { return words(vorrq_u8(bytes(mask(v, bits)), bytes(code))); }
  // Bits of `a` where `bits` has them, else of `b`.
  static FQ_INLINE I select(uint8_t bits, I a, I b) { return words(vbslq_u8(vdupq_n_u8(bits), bytes(a), bytes(b))); }
  static FQ_INLINE I quad(const int8_t* q) {
    int32_t value;
    __builtin_memcpy(&value, q, 4);
    return vdupq_n_s32(value);
  }
  // The dot product takes signed bytes: 8-bit codes are moved down by 128, which `finish` takes back.
  template <bool kFull>
  static FQ_INLINE I dot(I sum, I code, I quad) {
    uint8x16_t c = bytes(code);
    if constexpr (kFull) c = veorq_u8(c, vdupq_n_u8(0x80));
    return vdotq_s32(sum, vreinterpretq_s8_u8(c), vreinterpretq_s8_s32(quad));
  }
  template <bool kFull>
  static FQ_INLINE I finish(I sum, float activations) {
    if constexpr (!kFull) return sum;
    return vaddq_s32(sum, vdupq_n_s32(128 * static_cast<int32_t>(activations)));
  }

  static FQ_INLINE F zero_f() { return vdupq_n_f32(0.0f); }
  static FQ_INLINE F set(float v) { return vdupq_n_f32(v); }
  static FQ_INLINE F to_float(I v) { return vcvtq_f32_s32(v); }
  static FQ_INLINE F add(F a, F b) { return vaddq_f32(a, b); }
  static FQ_INLINE F sub(F a, F b) { return vsubq_f32(a, b); }
  static FQ_INLINE F mul(F a, F b) { return vmulq_f32(a, b); }
  static FQ_INLINE F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static FQ_INLINE F load_f(const float* p) { return vld1q_f32(p); }
  static FQ_INLINE void store_f(float* p, F v) { vst1q_f32(p, v); }

  // Up to 4 elements of any dtype at element index `at`, as fp32; those past `count` are not read.
  template <Dtype D>
  static FQ_INLINE F load_as(const void* base, int64_t at, int64_t count = kLanes) {
    constexpr int size = D == Dtype::kFloat ? 4 : 2;
    const char* source = static_cast<const char*>(base) + at * size;
    alignas(16) char part[16];
    if (count < kLanes) {
      __builtin_memset(part, 0, sizeof part);
      __builtin_memcpy(part, source, (count < 0 ? 0 : count) * size);
      source = part;
    }
    if constexpr (D == Dtype::kFloat) {
      return vreinterpretq_f32_u8(vld1q_u8(reinterpret_cast<const uint8_t*>(source)));
    } else {
      const uint8x8_t half = vld1_u8(reinterpret_cast<const uint8_t*>(source));
      if constexpr (D == Dtype::kHalf) return vcvt_f32_f16(vreinterpret_f16_u8(half));
      return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(half), 16));
    }
  }

  template <Dtype D>
  static FQ_INLINE void store_as(void* base, int64_t at, F value, int64_t count) {
    constexpr int size = D == Dtype::kFloat ? 4 : 2;
    alignas(16) uint8_t part[16];
    uint8_t* target = static_cast<uint8_t*>(base) + at * size;
    uint8_t* whole = count < kLanes ? part : target;
    if constexpr (D == Dtype::kFloat) {
      vst1q_u8(whole, vreinterpretq_u8_f32(value));
    } else if constexpr (D == Dtype::kHalf) {
      vst1_u8(whole, vreinterpret_u8_f16(vcvt_f16_f32(value)));
    } else {
      vst1_u8(whole, vreinterpret_u8_u16(to_bfloat16(value)));
    }
    if (count < kLanes) __builtin_memcpy(target, part, (count < 0 ? 0 : count) * size);
  }

  // Round to nearest even; NaN stays NaN.
  static FQ_INLINE uint16x4_t to_bfloat16(F value) {
    const uint32x4_t bits = vreinterpretq_u32_f32(value);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7FFF)), odd);
    const uint32x4_t number = vceqq_f32(value, value);
    return vshrn_n_u32(vbslq_u32(number, rounded, vdupq_n_u32(0x7FC00000)), 16);
  }

  static FQ_INLINE I max_magnitude(I top, F v) {
    return vmaxq_s32(top, vandq_s32(vreinterpretq_s32_f32(v), vdupq_n_s32(0x7FFFFFFF)));
  }
  static FQ_INLINE int32_t reduce_max(I v) { return vmaxvq_s32(v); }
  static FQ_INLINE int32_t reduce_add(I v) { return vaddvq_s32(v); }
  static FQ_INLINE I round_to_int(F v) { return vcvtnq_s32_f32(v); }
  static FQ_INLINE void store_int8(int8_t* p, I v) {
    const int16x4_t half = vqmovn_s32(v);
    const int8x8_t q = vqmovn_s16(vcombine_s16(half, half));
    vst1_lane_s32(reinterpret_cast<int32_t*>(p), vreinterpret_s32_s8(q), 0);
  }

  // For entropy.h.
  static FQ_INLINE F max(F a, F b) { return vmaxnmq_f32(a, b); }
  static FQ_INLINE float reduce_max(F v) { return vmaxnmvq_f32(v); }
  static FQ_INLINE float reduce_add(F v) { return vaddvq_f32(v); }
  static FQ_INLINE F nearest(F v) { return vrndnq_f32(v); }
  // n is a whole number in [-126, 0].
  static FQ_INLINE F scale_by_power(F v, F n) {
    const I exponent = vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23);
    return vmulq_f32(v, vreinterpretq_f32_s32(exponent));
  }
  static FQ_INLINE F keep_at_least(F v, F limit, F value) {
    return vreinterpretq_f32_u32(vandq_u32(vcgeq_f32(v, limit), vreinterpretq_u32_f32(value)));
  }
  static FQ_INLINE F fill_past(F v, int64_t count, F fill) {
    static const int32_t lanes[4] = {0, 1, 2, 3};
    const uint32x4_t inside = vcltq_s32(vld1q_s32(lanes), vdupq_n_s32(static_cast<int>(count < kLanes ? count : kLanes)));
    return vbslq_f32(inside, v, fill);
  }
};

}  // namespace
}  // namespace flexquant
