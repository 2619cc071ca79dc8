// SPDX-License-Identifier: Apache-2.0
// From the interface in kernels.h to the source of the selected instruction set.
#include "isa.h"
#include "kernels.h"

namespace flexquant {

void linear(const LinearArgs& a) {
  switch (selected_isa()) {
#if defined(__x86_64__)
    case Isa::kAmxInt8: return amx::linear(a);
    case Isa::kAvx512Vnni: return avx512::linear(a);
    case Isa::kAvxVnni: return avx_vnni::linear(a);
    case Isa::kAvx2: return avx2::linear(a);
#elif defined(__aarch64__)
    case Isa::kNeonDotprod: return neon::linear(a);
#endif
    default: return;
  }
}

void entropy(const EntropyArgs& a) {
  switch (selected_isa()) {
#if defined(__x86_64__)
    case Isa::kAmxInt8:
    case Isa::kAvx512Vnni: return avx512::entropy(a);
    case Isa::kAvxVnni:
    case Isa::kAvx2: return avx2::entropy(a);
#elif defined(__aarch64__)
    case Isa::kNeonDotprod: return neon::entropy(a);
#endif
    default: return;
  }
}

}  // namespace flexquant
