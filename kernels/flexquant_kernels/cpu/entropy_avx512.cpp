// SPDX-License-Identifier: Apache-2.0
// Entropy on AVX512-VNNI.
#include "common.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")
#endif

#include "entropy.h"
#include "simd_avx512.h"

namespace flexquant::avx512 {
void entropy(const EntropyArgs& a) { run_entropy<Avx512>(a); }
}  // namespace flexquant::avx512

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
