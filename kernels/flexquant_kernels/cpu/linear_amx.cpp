// SPDX-License-Identifier: Apache-2.0
// Linear layer on AMX-int8: the vectors are AVX512's, the integer sums of blocks of rows come from tile registers.
//
// A group of 64 k of a panel is, as it lies, the second operand of a tile product (16 rows of 16 columns x 4 k);
// the first is 16 rows of activations, 64 bytes each. The product of a group is an exact int32 16 x 16, to which
// the fp32 chain of planes.h is applied row by row, so rows get the same bits as on every other path.
#include "common.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni,amx-tile,amx-int8"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni,amx-tile,amx-int8")
#endif

#include "linear.h"
#include "simd_avx512.h"

namespace flexquant {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

struct AmxGemm {
  using Simd = Avx512;
  static constexpr int kFusedRows = 4;
  static constexpr int kTiles = 1;
  static constexpr int64_t kPanelK = 1024;  // 16 KiB of codes: unpacked and used within L1
  static constexpr int64_t kRows = 16;

  static constexpr bool kBlocks = true;

  // Tiles 0 and 1: int32 sums of even and odd groups; 2 and 3: activations; 4 and 5: codes.
  static void enter(const LinearArgs& a) {
    TileConfig config;
    const int64_t k = a.group < 64 ? a.group : 64, rows = a.rows < 16 ? a.rows : 16;
    for (int i = 0; i < 6; ++i) {
      config.bytes[i] = i == 2 || i == 3 ? k : 64;
      config.rows[i] = i < 4 ? rows : k / 4;
    }
    _tile_loadconfig(&config);
  }
  static void leave() { _tile_release(); }

  static void multiply(const LinearArgs& a, const Activations& x, const Panel& p, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row += 16) {
      const int64_t rows = end - row < 16 ? end - row : 16;
      unroll<16>([&](auto r) FQ_LAMBDA {
        if (rows == r + 1) block<r + 1>(a, x, p, row, row - begin);
      });
    }
  }

 private:
  // R rows from a multiple of 16 on: sums of one group at a time, while the one before is scaled and added up.
  template <int R>
  static void block(const LinearArgs& a, const Activations& x, const Panel& p, int64_t row, int64_t carry_row) {
    alignas(64) int32_t sums[2][16 * 16];
    float* carry = p.carry + carry_row * kTile;
    __m512 total[R];
    unroll<R>([&](auto r) FQ_LAMBDA {
      total[r] = p.k_begin == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(carry + r * kTile);
    });
    const int64_t first = p.k_begin / a.group, count = p.k_end / a.group - first;
    const int8_t* q = x.q + row * a.k + p.k_begin * 16;
    const float* pairs = x.pairs + (row * x.groups + first * 16) * 2;

    const auto add = [&](const int32_t* sum, int64_t g) FQ_LAMBDA {
      const GroupScales<Avx512> pair(a, p.tile, 0, first + g);
      const float* xs = pairs + g * 32;
      unroll<R>([&](auto r) FQ_LAMBDA {
        total[r] = pair.add(total[r], _mm512_load_si512(sum + r * 16), xs[r], xs[16 + r]);
      });
    };

    int64_t g = 0;
    product<0>(a.group, q, p.codes, sums[0], 0);
    for (; g + 2 < count; g += 2) {
      product<1>(a.group, q, p.codes, sums[1], g + 1);
      if (carry_row == 0) p.prefetch(g);
      add(sums[0], g);
      if (carry_row == 0) p.prefetch(g + 1);
      product<0>(a.group, q, p.codes, sums[0], g + 2);
      add(sums[1], g + 1);
    }
    if (g + 1 < count) product<1>(a.group, q, p.codes, sums[1], g + 1);
    add(sums[0], g);
    if (g + 1 < count) add(sums[1], g + 1);

    unroll<R>([&](auto r) FQ_LAMBDA {
      if (p.k_end == a.k) {
        store_outputs<Avx512>(a, row + r, p.tile, 0, total[r]);
      } else {
        _mm512_storeu_ps(carry + r * kTile, total[r]);
      }
    });
  }

  // sums = activations x codes of group g of the panel, in the tiles of even groups or in those of odd ones. Tiles
  // can only be named by literals.
  template <int Odd>
  static FQ_INLINE void product(int64_t group, const int8_t* q, const uint8_t* codes, int32_t* sums, int64_t g) {
    q += g * group * 16;
    codes += g * group * 16;
    if constexpr (Odd) {
      _tile_zero(1);
      for (int64_t k = 0; k < group; k += 64, q += 1024, codes += 1024) {
        _tile_loadd(3, q, group < 64 ? group : 64);
        _tile_loadd(5, codes, 64);
        _tile_dpbsud(1, 3, 5);
      }
      _tile_stored(1, sums, 64);
    } else {
      _tile_zero(0);
      for (int64_t k = 0; k < group; k += 64, q += 1024, codes += 1024) {
        _tile_loadd(2, q, group < 64 ? group : 64);
        _tile_loadd(4, codes, 64);
        _tile_dpbsud(0, 2, 4);
      }
      _tile_stored(0, sums, 64);
    }
  }
};

}  // namespace

namespace amx {
void linear(const LinearArgs& a) { linear_in_chunks<AmxGemm>(a); }
}  // namespace amx
}  // namespace flexquant

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
