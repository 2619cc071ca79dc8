// SPDX-License-Identifier: Apache-2.0
// Compile-time loops, compiled for the target that the including source has raised.
#pragma once

#include "common.h"

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

}  // namespace
}  // namespace flexquant
