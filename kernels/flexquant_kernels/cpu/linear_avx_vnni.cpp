// SPDX-License-Identifier: Apache-2.0
// Linear layer on AVX-VNNI.
#include "common.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avxvnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avxvnni")
#endif

#include "linear.h"
#include "simd_avx2.h"

namespace flexquant::avx_vnni {
void linear(const LinearArgs& a) { linear_in_chunks<VectorGemm<Avx2<true>>>(a); }
}  // namespace flexquant::avx_vnni

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
