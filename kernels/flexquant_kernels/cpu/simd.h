// SPDX-License-Identifier: Apache-2.0
// Shared by the AVX512 sources, which are compiled for a plain x86-64 and raise their target from here on:
// nothing that other translation units could share (std templates) may be included after this header.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <omp.h>

namespace flexquant {

// Memory of the calling thread that grows and is kept between calls.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  uint8_t* reserve(size_t bytes) {
    if (bytes > size_) {
      const size_t rounded = (bytes + 4095) / 4096 * 4096;
      void* grown = std::aligned_alloc(64, rounded);
      if (grown == nullptr) throw std::bad_alloc();
      std::free(data_);
      data_ = static_cast<uint8_t*>(grown);
      size_ = rounded;
    }
    return data_;
  }

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

constexpr size_t align64(size_t bytes) { return (bytes + 63) / 64 * 64; }

// Threads worth starting: each gets at least `grain` units of `work`, and no more threads than parts.
inline int thread_count(int64_t work, int64_t grain, int64_t parts, int max_threads) {
  if (omp_in_parallel()) return 1;
  int64_t threads = work / grain;
  if (threads > parts) threads = parts;
  if (threads > max_threads) threads = max_threads;
  return threads < 1 ? 1 : static_cast<int>(threads);
}

}  // namespace flexquant

#define FQ_INLINE __attribute__((always_inline)) inline
#define FQ_LAMBDA __attribute__((always_inline))

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni"))), \
                             apply_to = function)
#define FQ_TARGET_END _Pragma("clang attribute pop")
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")
#define FQ_TARGET_END
#endif

namespace flexquant {
namespace {

template <class F, int... I>
FQ_INLINE void unroll_impl(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}

// f(0), f(1), .. f(N - 1) with compile-time arguments.
template <int N, class F>
FQ_INLINE void unroll(F&& f) {
  unroll_impl(f, std::make_integer_sequence<int, N>{});
}

FQ_INLINE __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? __mmask16(0xFFFF) : __mmask16((1u << count) - 1);
}

// 16 elements of any dtype at element index `at`, as fp32; lanes outside the mask are not read.
template <Dtype D>
FQ_INLINE __m512 load16(const void* base, int64_t at, __mmask16 lanes = 0xFFFF) {
  if constexpr (D == Dtype::kFloat) {
    return _mm512_maskz_loadu_ps(lanes, static_cast<const float*>(base) + at);
  } else {
    const __m256i half = _mm256_maskz_loadu_epi16(lanes, static_cast<const uint16_t*>(base) + at);
    if constexpr (D == Dtype::kHalf) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
}

// Round to nearest even; NaN stays NaN.
FQ_INLINE __m256i to_bfloat16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

template <Dtype D>
FQ_INLINE void store16(void* base, int64_t at, __m512 value, __mmask16 lanes) {
  if constexpr (D == Dtype::kFloat) {
    _mm512_mask_storeu_ps(static_cast<float*>(base) + at, lanes, value);
  } else {
    __m256i half;
    if constexpr (D == Dtype::kHalf) {
      half = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {
      half = to_bfloat16(value);
    }
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(base) + at, lanes, half);
  }
}

}  // namespace
}  // namespace flexquant

#endif  // __x86_64__
