// SPDX-License-Identifier: Apache-2.0
// Detection by CPUID and XGETBV, not by __builtin_cpu_supports: GCC 12 does not know AVX-VNNI and AMX
// there, and nothing there tells whether Linux lets the process use AMX tiles.
#include "isa.h"

#include <atomic>
#include <cstring>
#include <initializer_list>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace flexquant {
namespace {

struct Named {
  Isa isa;
  const char* name;
};

constexpr Named kBestFirst[] = {
    {Isa::kAmxInt8, "amx_int8"}, {Isa::kAvx512Vnni, "avx512_vnni"},   {Isa::kAvxVnni, "avx_vnni"},
    {Isa::kAvx2, "avx2"},        {Isa::kNeonDotprod, "neon_dotprod"},
};

struct Features {
  bool neon_dotprod = false, avx2 = false, avx_vnni = false, avx512_vnni = false, amx_int8 = false;
};

#if defined(__x86_64__)

constexpr bool has(unsigned long long word, std::initializer_list<int> bits) {
  for (const int bit : bits) {
    if ((word >> bit & 1) == 0) return false;
  }
  return true;
}

// Registers whose state the operating system keeps, as bits of XCR0.
unsigned long long kept_state() {
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<unsigned long long>(high) << 32) | low;
}

bool may_use_tiles() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Features detect() {
  Features found;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !has(c, {12, 27, 28, 29})) return found;  // FMA, OSXSAVE, AVX, F16C
  const unsigned long long kept = kept_state();
  if (!has(kept, {1, 2}) || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;  // SSE, AVX
  found.avx2 = has(b, {5});
  if (!found.avx2) return found;
  found.avx512_vnni = has(kept, {5, 6, 7}) && has(b, {16, 30, 31}) && has(c, {11});  // F, BW, VL; VNNI
  found.amx_int8 = found.avx512_vnni && has(kept, {17, 18}) && has(d, {24, 25}) && may_use_tiles();
  const unsigned last_subleaf = a;
  found.avx_vnni = last_subleaf >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && has(a, {4});
  return found;
}

#elif defined(__aarch64__)

Features detect() {
  Features found;
  found.neon_dotprod = (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
  return found;
}

#else

Features detect() { return {}; }

#endif

Isa best() noexcept {
  for (const Named& known : kBestFirst) {
    if (isa_supported(known.isa)) return known.isa;
  }
  return Isa::kNone;
}

// A local static, so that the static initializers of other sources may ask.
std::atomic<Isa>& selection() noexcept {
  static std::atomic<Isa> value{best()};
  return value;
}

}  // namespace

const char* isa_name(Isa isa) noexcept {
  for (const Named& known : kBestFirst) {
    if (known.isa == isa) return known.name;
  }
  return "none";
}

bool isa_supported(Isa isa) noexcept {
  static const Features found = detect();
  switch (isa) {
    case Isa::kNeonDotprod: return found.neon_dotprod;
    case Isa::kAvx2: return found.avx2;
    case Isa::kAvxVnni: return found.avx_vnni;
    case Isa::kAvx512Vnni: return found.avx512_vnni;
    case Isa::kAmxInt8: return found.amx_int8;
    case Isa::kNone: break;
  }
  return false;
}

Isa selected_isa() noexcept { return selection().load(std::memory_order_relaxed); }

bool select_isa(Isa isa) noexcept {
  if (!isa_supported(isa)) return false;
  selection().store(isa, std::memory_order_relaxed);
  return true;
}

}  // namespace flexquant

#define FQ_EXPORT extern "C" __attribute__((visibility("default")))

// Of this machine, comma-separated, best first; empty where it has none. The text lives as long as the process.
FQ_EXPORT const char* flexquant_supported_isas() {
  static const std::string joined = [] {
    std::string text;
    for (const auto& known : flexquant::kBestFirst) {
      if (!flexquant::isa_supported(known.isa)) continue;
      if (!text.empty()) text += ',';
      text += known.name;
    }
    return text;
  }();
  return joined.c_str();
}

// 1 when done; 0, with the selection as it was, when the name is unknown or the machine lacks the set.
FQ_EXPORT int flexquant_select_isa(const char* name) {
  for (const auto& known : flexquant::kBestFirst) {
    if (name != nullptr && std::strcmp(name, known.name) == 0) return flexquant::select_isa(known.isa) ? 1 : 0;
  }
  return 0;
}

FQ_EXPORT const char* flexquant_selected_isa() { return flexquant::isa_name(flexquant::selected_isa()); }
