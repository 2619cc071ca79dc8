// SPDX-License-Identifier: Apache-2.0
// Interface between the torch binding and the kernels. No torch header here: the kernels compile without.
#pragma once

#include <cstddef>
#include <cstdint>

namespace flexquant {

enum class Dtype : int { kFloat, kBFloat16, kHalf };

constexpr int64_t kTile = 16;       // output rows per tile
constexpr int64_t kVector = 64;     // bytes per vector of codes: 16 rows x 4 k
constexpr int64_t kBlock = 32;      // k per block: 8 vectors of codes
constexpr int64_t kMaxPlanes = 8;

enum class LayoutId : int { k422, k224, k21122, kUnsupported };

struct LinearArgs {
  const void* x;                     // [rows, k] of dtype, contiguous
  void* out;                         // [rows, n] of dtype
  Dtype dtype;
  const void* bias;                  // [n] of bias_dtype, or null
  Dtype bias_dtype;
  const uint8_t* planes[kMaxPlanes]; // tiled, [ceil(n/16), k*w*2] each; only planes in use are set
  const uint16_t* scales;            // fp16 [ceil(n/16), k/group, 2, 16] of the width in use
  float step;                        // 2^(8-width) when all widths share one pair of 8 bits, else 1
  LayoutId layout;
  int planes_used;
  int64_t rows, k, n, group;
  int max_threads;
};

struct EntropyArgs {
  const void* logits;  // [rows, vocab] of dtype, contiguous
  float* out;          // [rows], nats
  Dtype dtype;
  int64_t rows, vocab;
  int max_threads;
};

// On the instruction set that isa.h has selected; nothing happens without one.
// Throw std::bad_alloc when scratch memory cannot be had; nothing else.
void linear(const LinearArgs& args);
void entropy(const EntropyArgs& args);

// One source each. Calling one that the machine lacks is an illegal instruction.
namespace amx { void linear(const LinearArgs& args); }
namespace avx512 { void linear(const LinearArgs& args); void entropy(const EntropyArgs& args); }
namespace avx_vnni { void linear(const LinearArgs& args); }
namespace avx2 { void linear(const LinearArgs& args); void entropy(const EntropyArgs& args); }
namespace neon { void linear(const LinearArgs& args); void entropy(const EntropyArgs& args); }

}  // namespace flexquant
