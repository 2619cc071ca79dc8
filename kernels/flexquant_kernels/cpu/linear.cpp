// SPDX-License-Identifier: Apache-2.0
// Linear layer over bit planes: u8 codes x s8 activations with AVX512-VNNI.
//
// Tiled planes (pack.py): a tile is 16 output rows, a vector of codes is 16 rows x 4 k, and a plane of w
// bits keeps 8/w such vectors in one, so 32 k of a tile are w vectors. Activations are quantized once per
// row and group; then, per tile and row,
//     out += sx * (scale * sum(q * xq) + offset * sum(xq))        groups ascending, in fp32
// The integer sums are exact and the fp32 chain of an output element is the same on every path below, so
// an element's bits depend neither on the other rows nor on threads.
#include "simd.h"

#if defined(__x86_64__)

namespace flexquant {
namespace {

constexpr int kFusedRows = 4;                // rows up to here are unpacked and multiplied in one pass
constexpr int kGemmRows = 6;                 // x 2 tiles: 12 integer accumulators
constexpr int kGemmTiles = 2;
constexpr int64_t kPanelK = 8192;            // k per unpacked panel: 2 x 128 KiB, within L2
constexpr int64_t kActivationBytes = 768 << 10;  // quantized rows that are kept in L2 across tiles
constexpr int64_t kGrain = 128 << 10;        // codes x rows that are worth a thread
constexpr int64_t kQuantizeGrain = 32 << 10; // activations that are worth a thread
constexpr float kMinAmax = 0x1p-100f;        // as MIN_AMAX in reference.py

template <int... W>
struct Layout {
  static constexpr int kPlanes = sizeof...(W);
  static constexpr int width[kPlanes] = {W...};
  // Bits, and vectors per block, in the planes before `plane`.
  static constexpr int begin(int plane) {
    int sum = 0;
    for (int i = 0; i < plane; ++i) sum += width[i];
    return sum;
  }
};

// 32 k of one tile, from the first P planes: begin(P) vectors in, 8 vectors of codes out.
template <class L, int P>
struct Block {
  __m512i packed[L::begin(P)];

  FQ_INLINE void load(const uint8_t* const (&plane)[P], int64_t block) {
    unroll<P>([&](auto p) FQ_LAMBDA {
      constexpr int w = L::width[p];
      unroll<w>([&](auto j) FQ_LAMBDA {
        packed[L::begin(p) + j] = _mm512_loadu_si512(plane[p] + (block * w + j) * kVector);
      });
    });
  }

  template <int Q>
  FQ_INLINE __m512i codes() const {
    __m512i code = _mm512_setzero_si512();
    unroll<P>([&](auto p) FQ_LAMBDA {
      constexpr int w = L::width[p];
      constexpr int target = L::begin(P) - L::begin(p + 1);
      constexpr int shift = (Q % (8 / w)) * w - target;
      __m512i v = packed[L::begin(p) + Q / (8 / w)];
      // 16-bit shifts stand in for byte shifts: the mask drops what crossed over.
      if constexpr (shift > 0) v = _mm512_srli_epi16(v, shift);
      if constexpr (shift < 0) v = _mm512_slli_epi16(v, -shift);
      const __m512i mask = _mm512_set1_epi8(static_cast<char>(((1 << w) - 1) << target));
      if constexpr (p == 0) {
        code = _mm512_and_si512(v, mask);
      } else {
        code = _mm512_ternarylogic_epi32(v, mask, code, 0xEA);  // (v & mask) | code
      }
    });
    return code;
  }
};

template <class L, int P>
FQ_INLINE void tile_planes(const LinearArgs& a, int64_t tile, const uint8_t* (&plane)[P]) {
  unroll<P>([&](auto p) FQ_LAMBDA { plane[p] = a.planes[p] + tile * a.k * L::width[p] * 2; });
}

struct Activations {
  const int8_t* q;    // [rows, k]
  const float* scale; // [rows, groups]
  const float* sum;   // [rows, groups] sum of q
};

FQ_INLINE __m512i broadcast_quad(const int8_t* q) {
  int32_t quad;
  __builtin_memcpy(&quad, q, 4);
  return _mm512_set1_epi32(quad);
}

struct GroupScales {
  __m512 scale, offset;

  FQ_INLINE GroupScales(const LinearArgs& a, int64_t tile, int64_t group) {
    const uint16_t* pair = a.scales + (tile * (a.k / a.group) + group) * 2 * kTile;
    const __m512 s = load16<Dtype::kHalf>(pair, 0);
    const __m512 o = load16<Dtype::kHalf>(pair, kTile);
    scale = _mm512_mul_ps(s, _mm512_set1_ps(a.step));
    offset = _mm512_fmadd_ps(s, _mm512_set1_ps((a.step - 1.0f) * 0.5f), o);
  }

  // The one place where an output element's fp32 chain is written down.
  FQ_INLINE __m512 add(__m512 total, __m512i acc, float sx, float sum) const {
    const __m512 inner = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(acc), _mm512_mul_ps(offset, _mm512_set1_ps(sum)));
    return _mm512_fmadd_ps(_mm512_set1_ps(sx), inner, total);
  }
};

FQ_INLINE __m512 tile_bias(const LinearArgs& a, int64_t tile, __mmask16 lanes) {
  if (a.bias == nullptr) return _mm512_setzero_ps();
  switch (a.bias_dtype) {
    case Dtype::kFloat: return load16<Dtype::kFloat>(a.bias, tile * kTile, lanes);
    case Dtype::kBFloat16: return load16<Dtype::kBFloat16>(a.bias, tile * kTile, lanes);
    default: return load16<Dtype::kHalf>(a.bias, tile * kTile, lanes);
  }
}

FQ_INLINE void store_tile(const LinearArgs& a, int64_t row, int64_t tile, __m512 total) {
  const __mmask16 lanes = first_lanes(a.n - tile * kTile);
  const int64_t at = row * a.n + tile * kTile;
  if (a.bias != nullptr) total = _mm512_add_ps(total, tile_bias(a, tile, lanes));
  switch (a.dtype) {
    case Dtype::kFloat: return store16<Dtype::kFloat>(a.out, at, total, lanes);
    case Dtype::kBFloat16: return store16<Dtype::kBFloat16>(a.out, at, total, lanes);
    default: return store16<Dtype::kHalf>(a.out, at, total, lanes);
  }
}

template <Dtype D>
void quantize_row(const LinearArgs& a, int64_t row, int8_t* q, float* scale, float* sum) {
  const int64_t groups = a.k / a.group;
  const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t at = row * a.k + g * a.group;
    // Magnitudes order like their bit patterns, with infinity and then NaN above every finite number.
    __m512i top = _mm512_setzero_si512();
    for (int64_t i = 0; i < a.group; i += 16) {
      top = _mm512_max_epi32(top, _mm512_and_si512(_mm512_castps_si512(load16<D>(a.x, at + i)), magnitude));
    }
    const int32_t bits = _mm512_reduce_max_epi32(top);
    float amax;
    __builtin_memcpy(&amax, &bits, 4);
    const bool finite = bits < 0x7F800000;
    int8_t* target = q + row * a.k + g * a.group;
    if (!finite || amax < kMinAmax) {
      __builtin_memset(target, 0, a.group);
      scale[row * groups + g] = finite ? 0.0f : __builtin_nanf("");
      sum[row * groups + g] = 0.0f;
      continue;
    }
    const __m512 inverse = _mm512_set1_ps(127.0f / amax);
    __m512i total = _mm512_setzero_si512();
    for (int64_t i = 0; i < a.group; i += 16) {
      const __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(load16<D>(a.x, at + i), inverse));
      total = _mm512_add_epi32(total, v);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i), _mm512_cvtsepi32_epi8(v));
    }
    scale[row * groups + g] = amax / 127.0f;
    sum[row * groups + g] = static_cast<float>(_mm512_reduce_add_epi32(total));
  }
}

void quantize_rows(const LinearArgs& a, int64_t begin, int64_t end, int8_t* q, float* scale, float* sum) {
  for (int64_t row = begin; row < end; ++row) {
    switch (a.dtype) {
      case Dtype::kFloat: quantize_row<Dtype::kFloat>(a, row, q, scale, sum); break;
      case Dtype::kBFloat16: quantize_row<Dtype::kBFloat16>(a, row, q, scale, sum); break;
      default: quantize_row<Dtype::kHalf>(a, row, q, scale, sum); break;
    }
  }
}

// All R rows (1 to 4) of the call over tiles [begin, end).
template <class L, int P, int R>
void fused_tiles(const LinearArgs& a, const Activations& x, int64_t begin, int64_t end) {
  constexpr int kChains = R == 1 ? 4 : R == 2 ? 2 : 1;  // hides the latency of dpbusd
  const int64_t groups = a.k / a.group, blocks = a.group / kBlock;
  for (int64_t tile = begin; tile < end; ++tile) {
    const uint8_t* plane[P];
    tile_planes<L, P>(a, tile, plane);
    __m512 total[R];
    unroll<R>([&](auto r) FQ_LAMBDA { total[r] = _mm512_setzero_ps(); });
    for (int64_t g = 0; g < groups; ++g) {
      __m512i acc[R][kChains];
      unroll<R * kChains>([&](auto i) FQ_LAMBDA { acc[i / kChains][i % kChains] = _mm512_setzero_si512(); });
      for (int64_t block = g * blocks; block < (g + 1) * blocks; ++block) {
        Block<L, P> w;
        w.load(plane, block);
        const int8_t* q = x.q + block * kBlock;
        unroll<8>([&](auto quad) FQ_LAMBDA {
          const __m512i code = w.template codes<quad>();
          unroll<R>([&](auto r) FQ_LAMBDA {
            __m512i& chain = acc[r][quad % kChains];
            chain = _mm512_dpbusd_epi32(chain, code, broadcast_quad(q + r * a.k + quad * 4));
          });
        });
      }
      const GroupScales pair(a, tile, g);
      unroll<R>([&](auto r) FQ_LAMBDA {
        __m512i sum = acc[r][0];
        unroll<kChains - 1>([&](auto c) FQ_LAMBDA { sum = _mm512_add_epi32(sum, acc[r][c + 1]); });
        total[r] = pair.add(total[r], sum, x.scale[r * groups + g], x.sum[r * groups + g]);
      });
    }
    unroll<R>([&](auto r) FQ_LAMBDA { store_tile(a, r, tile, total[r]); });
  }
}

// Codes of one tile, blocks [first, first + count): [count * 8][64] bytes.
template <class L, int P>
void unpack_panel(const LinearArgs& a, int64_t tile, int64_t first, int64_t count, uint8_t* panel) {
  const uint8_t* plane[P];
  tile_planes<L, P>(a, tile, plane);
  for (int64_t i = 0; i < count; ++i) {
    Block<L, P> w;
    w.load(plane, first + i);
    unroll<8>([&](auto quad) FQ_LAMBDA {
      _mm512_store_si512(panel + (i * 8 + quad) * kVector, w.template codes<quad>());
    });
  }
}

struct Panel {
  const uint8_t* codes; // [tiles][quads][64]
  float* carry;         // [rows][tiles][16] sums between panels of one tile, or null when K is one panel
  int64_t tile;         // first tile
  int64_t k_begin, k_end;
};

// R rows x T tiles over one panel.
template <int T, int R>
void panel_rows(const LinearArgs& a, const Activations& x, const Panel& p, int64_t row, int64_t carry_row) {
  const int64_t groups = a.k / a.group, quads = (p.k_end - p.k_begin) / 4, quads_per_group = a.group / 4;
  float* carry = p.carry == nullptr ? nullptr : p.carry + carry_row * kGemmTiles * kTile;
  __m512 total[R][T];
  unroll<R * T>([&](auto i) FQ_LAMBDA {
    constexpr int r = i / T, t = i % T;
    total[r][t] = p.k_begin == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(carry + (r * kGemmTiles + t) * kTile);
  });
  const int8_t* q = x.q + row * a.k + p.k_begin;
  const uint8_t* codes = p.codes;
  for (int64_t g = p.k_begin / a.group; g < p.k_end / a.group; ++g) {
    __m512i acc[R][T];
    unroll<R * T>([&](auto i) FQ_LAMBDA { acc[i / T][i % T] = _mm512_setzero_si512(); });
#pragma GCC unroll 4
    for (int64_t quad = 0; quad < quads_per_group; ++quad) {
      __m512i code[T];
      unroll<T>([&](auto t) FQ_LAMBDA { code[t] = _mm512_load_si512(codes + t * quads * kVector); });
      unroll<R>([&](auto r) FQ_LAMBDA {
        const __m512i xr = broadcast_quad(q + r * a.k);
        unroll<T>([&](auto t) FQ_LAMBDA { acc[r][t] = _mm512_dpbusd_epi32(acc[r][t], code[t], xr); });
      });
      codes += kVector;
      q += 4;
    }
    unroll<T>([&](auto t) FQ_LAMBDA {
      const GroupScales pair(a, p.tile + t, g);
      unroll<R>([&](auto r) FQ_LAMBDA {
        const int64_t at = (row + r) * groups + g;
        total[r][t] = pair.add(total[r][t], acc[r][t], x.scale[at], x.sum[at]);
      });
    });
  }
  unroll<R * T>([&](auto i) FQ_LAMBDA {
    constexpr int r = i / T, t = i % T;
    if (p.k_end == a.k) {
      store_tile(a, row + r, p.tile + t, total[r][t]);
    } else {
      _mm512_storeu_ps(carry + (r * kGemmTiles + t) * kTile, total[r][t]);
    }
  });
}

template <int T>
void panel_row_block(const LinearArgs& a, const Activations& x, const Panel& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end;) {
    const int64_t left = end - row, blocks = (left + kGemmRows - 1) / kGemmRows;
    const int64_t rows = (left + blocks - 1) / blocks;
    switch (rows) {
      case 6: panel_rows<T, 6>(a, x, p, row, row - begin); break;
      case 5: panel_rows<T, 5>(a, x, p, row, row - begin); break;
      case 4: panel_rows<T, 4>(a, x, p, row, row - begin); break;
      case 3: panel_rows<T, 3>(a, x, p, row, row - begin); break;
      case 2: panel_rows<T, 2>(a, x, p, row, row - begin); break;
      default: panel_rows<T, 1>(a, x, p, row, row - begin); break;
    }
    row += rows;
  }
}

struct GemmPlan {
  int64_t row_block; // rows whose quantized activations stay in L2
  int64_t panel_k;   // k per panel
  size_t panel_bytes, carry_bytes;

  explicit GemmPlan(const LinearArgs& a) {
    row_block = kActivationBytes / a.k / kGemmRows * kGemmRows;
    if (row_block < kGemmRows) row_block = kGemmRows;
    if (row_block > a.rows) row_block = a.rows;
    panel_k = a.k < kPanelK ? a.k : kPanelK;
    panel_bytes = align64(size_t(kGemmTiles) * kTile * panel_k);
    carry_bytes = a.k > kPanelK ? align64(size_t(row_block) * kGemmTiles * kTile * sizeof(float)) : 0;
  }
};

// Pairs of tiles [begin, end) for every row.
template <class L, int P>
void gemm_pairs(const LinearArgs& a, const Activations& x, const GemmPlan& plan, uint8_t* scratch, int64_t begin,
                int64_t end) {
  const int64_t tiles = (a.n + kTile - 1) / kTile;
  uint8_t* codes = scratch;
  float* carry = plan.carry_bytes ? reinterpret_cast<float*>(scratch + plan.panel_bytes) : nullptr;
  for (int64_t row = 0; row < a.rows; row += plan.row_block) {
    const int64_t row_end = row + plan.row_block < a.rows ? row + plan.row_block : a.rows;
    for (int64_t pair = begin; pair < end; ++pair) {
      const int64_t tile = pair * kGemmTiles;
      const bool both = tile + 1 < tiles;
      for (int64_t k = 0; k < a.k; k += plan.panel_k) {
        const int64_t k_end = k + plan.panel_k < a.k ? k + plan.panel_k : a.k;
        const int64_t blocks = (k_end - k) / kBlock;
        unpack_panel<L, P>(a, tile, k / kBlock, blocks, codes);
        if (both) unpack_panel<L, P>(a, tile + 1, k / kBlock, blocks, codes + blocks * 8 * kVector);
        const Panel panel{codes, carry, tile, k, k_end};
        if (both) {
          panel_row_block<2>(a, x, panel, row, row_end);
        } else {
          panel_row_block<1>(a, x, panel, row, row_end);
        }
      }
    }
  }
}

struct Part {
  int64_t begin, end;
  Part(int64_t total, int64_t index, int64_t count) : begin(total * index / count), end(total * (index + 1) / count) {}
};

// One buffer per calling thread, whatever the layout and width.
uint8_t* linear_scratch(size_t bytes) {
  thread_local Scratch scratch;
  return scratch.reserve(bytes);
}

template <class L, int P>
void run(const LinearArgs& a) {
  const int64_t groups = a.k / a.group, tiles = (a.n + kTile - 1) / kTile;
  const bool fused = a.rows <= kFusedRows;
  const int64_t parts = fused ? tiles : (tiles + kGemmTiles - 1) / kGemmTiles;
  const int threads = thread_count(tiles * kTile * a.k * a.rows, kGrain, parts, a.max_threads);
  const bool quantize_apart = threads == 1 || a.rows == 1 || a.rows * a.k < 2 * kQuantizeGrain;

  const GemmPlan plan(a);
  const size_t per_thread = fused ? 0 : plan.panel_bytes + plan.carry_bytes;
  const size_t q_bytes = align64(size_t(a.rows) * a.k);
  const size_t group_bytes = align64(size_t(a.rows) * groups * sizeof(float));
  uint8_t* memory = linear_scratch(q_bytes + 2 * group_bytes + threads * per_thread);
  int8_t* q = reinterpret_cast<int8_t*>(memory);
  float* scale = reinterpret_cast<float*>(memory + q_bytes);
  float* sum = reinterpret_cast<float*>(memory + q_bytes + group_bytes);
  uint8_t* panels = memory + q_bytes + 2 * group_bytes;
  const Activations x{q, scale, sum};

  const auto multiply = [&](int64_t index, int64_t count) {
    const Part part(parts, index, count);
    if (!fused) return gemm_pairs<L, P>(a, x, plan, panels + index * per_thread, part.begin, part.end);
    switch (a.rows) {
      case 1: return fused_tiles<L, P, 1>(a, x, part.begin, part.end);
      case 2: return fused_tiles<L, P, 2>(a, x, part.begin, part.end);
      case 3: return fused_tiles<L, P, 3>(a, x, part.begin, part.end);
      default: return fused_tiles<L, P, 4>(a, x, part.begin, part.end);
    }
  };

  if (quantize_apart) quantize_rows(a, 0, a.rows, q, scale, sum);
  if (threads == 1) return multiply(0, 1);
#pragma omp parallel num_threads(threads)
  {
    // The runtime may grant fewer threads than asked; scratch was sized for all of them.
    const int index = omp_get_thread_num(), count = omp_get_num_threads();
    if (!quantize_apart) {
      const Part part(a.rows, index, count);
      quantize_rows(a, part.begin, part.end, q, scale, sum);
#pragma omp barrier
    }
    multiply(index, count);
  }
}

}  // namespace

void linear(const LinearArgs& a) {
  using L422 = Layout<4, 2, 2>;
  using L224 = Layout<2, 2, 4>;
  using L21122 = Layout<2, 1, 1, 2, 2>;
  if (a.rows == 0 || a.n == 0) return;
  switch (a.layout) {
    case LayoutId::k422:
      return a.planes_used == 1 ? run<L422, 1>(a) : a.planes_used == 2 ? run<L422, 2>(a) : run<L422, 3>(a);
    case LayoutId::k224:
      return a.planes_used == 1 ? run<L224, 1>(a) : a.planes_used == 2 ? run<L224, 2>(a) : run<L224, 3>(a);
    case LayoutId::k21122:
      switch (a.planes_used) {
        case 1: return run<L21122, 1>(a);
        case 2: return run<L21122, 2>(a);
        case 3: return run<L21122, 3>(a);
        case 4: return run<L21122, 4>(a);
        default: return run<L21122, 5>(a);
      }
    case LayoutId::kUnsupported: return;
  }
}

}  // namespace flexquant

FQ_TARGET_END

#else

namespace flexquant {
void linear(const LinearArgs&) {}
}  // namespace flexquant

#endif  // __x86_64__
