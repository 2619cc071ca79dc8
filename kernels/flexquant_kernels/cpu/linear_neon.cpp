// SPDX-License-Identifier: Apache-2.0
// Linear layer on NEON with the dot product of Armv8.2.
#include "common.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

#include "linear.h"
#include "simd_neon.h"

namespace flexquant::neon {
void linear(const LinearArgs& a) { linear_in_chunks<VectorGemm<Neon>>(a); }
}  // namespace flexquant::neon

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __aarch64__
