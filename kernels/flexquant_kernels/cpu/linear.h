// SPDX-License-Identifier: Apache-2.0
// Linear layer over bit planes: u8 codes x s8 activations, the flow that all instruction sets share.
//
// Tiled planes (pack.py): a tile is 16 output rows, a vector of codes is 16 rows x 4 k, and a plane of w
// bits keeps 8/w such vectors in one, so 32 k of a tile are w vectors. Activations are quantized once per
// row and group; then, per tile and row,
//     out += sx * (scale * sum(q * xq) + offset * sum(xq))        groups ascending, in fp32
// The integer sums are exact and the fp32 chain of an output element is the same on every path and every
// instruction set, so an element's bits depend neither on the other rows nor on threads.
//
// A few rows are fused: codes are unpacked into registers and used at once. More rows are blocked: the codes of
// a tile are unpacked into a panel, from which all rows are multiplied. `Gemm` is the second half.
#pragma once

#include "planes.h"

namespace flexquant {
namespace {

constexpr int64_t kRowBytes = 1 << 20;        // quantized rows that are kept in L2 across tiles
constexpr int64_t kChunkBytes = 16 << 20;     // quantized rows at a time: bounds the scratch memory
constexpr int64_t kGrain = 96 << 10;          // codes that are worth a thread
constexpr int64_t kQuantizeGrain = 32 << 10;  // activations that are worth a thread

// All R rows of the call over tiles [begin, end).
template <class V, class L, int P, int R>
void fused_tiles(const LinearArgs& a, const Activations& x, int64_t begin, int64_t end) {
  constexpr int kSubs = kTile / V::kLanes;
  constexpr int kChains = R * kSubs == 1 ? 4 : R * kSubs == 2 ? 2 : 1;  // hides the latency of the dot product
  const int64_t groups = a.k / a.group, blocks = a.group / kBlock;
  for (int64_t tile = begin; tile < end; ++tile) {
    const Planes<L, P> planes(a, tile);
    typename V::F total[kSubs][R];
    unroll<kSubs * R>([&](auto i) FQ_LAMBDA { total[i / R][i % R] = V::zero_f(); });
    for (int64_t g = 0; g < groups; ++g) {
      typename V::I acc[kSubs][R][kChains];
      unroll<kSubs * R * kChains>([&](auto i) FQ_LAMBDA {
        acc[i / (R * kChains)][i / kChains % R][i % kChains] = V::zero();
      });
      for (int64_t block = g * blocks; block < (g + 1) * blocks; ++block) {
        planes.prefetch(block);
        const int8_t* q = x.q + block * kBlock;
        unroll<kSubs>([&](auto s) FQ_LAMBDA {
          const Block<V, L, P> w(planes, block, s);
          unroll<8>([&](auto quad) FQ_LAMBDA {
            const auto code = w.template codes<quad>();
            unroll<R>([&](auto r) FQ_LAMBDA {
              auto& chain = acc[s][r][quad % kChains];
              chain = V::template dot<Block<V, L, P>::kFull>(chain, code, V::quad(q + r * a.k + quad * 4));
            });
          });
        });
      }
      __builtin_prefetch(a.scales + (tile * groups + g) * 2 * kTile + kAhead / 2);
      unroll<kSubs>([&](auto s) FQ_LAMBDA {
        const GroupScales<V> pair(a, tile, s, g);
        unroll<R>([&](auto r) FQ_LAMBDA {
          auto sum = acc[s][r][0];
          unroll<kChains - 1>([&](auto c) FQ_LAMBDA { sum = V::add(sum, acc[s][r][c + 1]); });
          const float* xs = x.pairs + (r * groups + g) * 2;
          sum = V::template finish<Block<V, L, P>::kFull>(sum, xs[1]);
          total[s][r] = pair.add(total[s][r], sum, xs[0], xs[1]);
        });
      });
    }
    unroll<kSubs * R>([&](auto i) FQ_LAMBDA { store_outputs<V>(a, i % R, tile, i / R, total[i / R][i % R]); });
  }
}

// Codes of one tile, blocks [first, first + count): [count * 8][64] bytes.
template <class V, class L, int P>
void unpack_panel(const LinearArgs& a, int64_t tile, int64_t first, int64_t count, uint8_t* panel) {
  const Planes<L, P> planes(a, tile);
  for (int64_t i = 0; i < count; ++i) {
    planes.prefetch(first + i);
    unroll<kTile / V::kLanes>([&](auto s) FQ_LAMBDA {
      const Block<V, L, P> w(planes, first + i, s);
      unroll<8>([&](auto quad) FQ_LAMBDA {
        V::store(panel + (i * 8 + quad) * kVector + s * V::kLanes * 4, w.template codes<quad>());
      });
    });
  }
}

// `tiles` tiles, k in [k_begin, k_end).
struct Panel {
  const uint8_t* codes;  // [tiles][quads][64]
  float* carry;          // [rows of the block][tiles][16]: sums between the panels of a tile
  int64_t tile, tiles;   // first tile, count
  int64_t k_begin, k_end;
  bool full;             // codes have 8 bits
  const uint8_t* next[kMaxPlanes];  // what will be unpacked after it, plane by plane, in one run of bytes each
  int64_t next_lines[kMaxPlanes];   // cache lines of `next` per group
  int planes;

  // While group `group` of the panel is multiplied: asks for what is to be unpacked next.
  FQ_INLINE void prefetch(int64_t group) const {
    for (int p = 0; p < planes; ++p) {
      const uint8_t* at = next[p] + group * next_lines[p] * kVector;
      for (int64_t i = 0; i < next_lines[p]; ++i) __builtin_prefetch(at + i * kVector, 0, 2);
    }
  }
};

// Blocks of rows in vector registers.
template <class V>
struct VectorGemm {
  using Simd = V;
  static constexpr int kFusedRows = V::kFusedRows;
  static constexpr int kTiles = V::kGemmTiles;
  static constexpr int64_t kPanelK = 8192;  // 2 x 128 KiB, within L2
  static constexpr int64_t kRows = V::kGemmRows;
  static constexpr bool kBlocks = false;
  static void enter(const LinearArgs&) {}
  static void leave() {}

  // Rows [begin, end) of the call over one panel.
  static void multiply(const LinearArgs& a, const Activations& x, const Panel& p, int64_t begin, int64_t end) {
    if (p.full) {
      p.tiles == kTiles ? row_block<true, kTiles>(a, x, p, begin, end) : row_block<true, 1>(a, x, p, begin, end);
    } else {
      p.tiles == kTiles ? row_block<false, kTiles>(a, x, p, begin, end) : row_block<false, 1>(a, x, p, begin, end);
    }
  }

 private:
  template <bool kFull, int T>
  static void row_block(const LinearArgs& a, const Activations& x, const Panel& p, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end;) {
      const int64_t left = end - row, blocks = (left + kRows - 1) / kRows, rows = (left + blocks - 1) / blocks;
      unroll<kRows>([&](auto r) FQ_LAMBDA {
        if (rows == r + 1) rows_of<kFull, T, r + 1>(a, x, p, row, row - begin);
      });
      row += rows;
    }
  }

  template <bool kFull, int T, int R>
  static void rows_of(const LinearArgs& a, const Activations& x, const Panel& p, int64_t row, int64_t carry_row) {
    constexpr int kSubs = kTile / V::kLanes, kCount = R * T * kSubs;
    const int64_t quads = (p.k_end - p.k_begin) / 4, quads_per_group = a.group / 4;
    float* carry = p.carry + carry_row * T * kTile;
    typename V::F total[R][T][kSubs];
    unroll<kCount>([&](auto i) FQ_LAMBDA {
      constexpr int r = i / (T * kSubs), t = i / kSubs % T, s = i % kSubs;
      total[r][t][s] = p.k_begin == 0 ? V::zero_f() : V::load_f(carry + (r * T + t) * kTile + s * V::kLanes);
    });
    const int8_t* q = x.q + row * a.k + p.k_begin;
    const uint8_t* codes = p.codes;
    for (int64_t g = p.k_begin / a.group; g < p.k_end / a.group; ++g) {
      typename V::I acc[R][T][kSubs];
      unroll<kCount>([&](auto i) FQ_LAMBDA { acc[i / (T * kSubs)][i / kSubs % T][i % kSubs] = V::zero(); });
#pragma GCC unroll 4
      for (int64_t quad = 0; quad < quads_per_group; ++quad) {
        typename V::I code[T][kSubs];
        unroll<T * kSubs>([&](auto i) FQ_LAMBDA {
          constexpr int t = i / kSubs, s = i % kSubs;
          code[t][s] = V::load(codes + t * quads * kVector + s * V::kLanes * 4);
        });
        unroll<R>([&](auto r) FQ_LAMBDA {
          const auto xr = V::quad(q + r * a.k);
          unroll<T * kSubs>([&](auto i) FQ_LAMBDA {
            auto& chain = acc[r][i / kSubs][i % kSubs];
            chain = V::template dot<kFull>(chain, code[i / kSubs][i % kSubs], xr);
          });
        });
        codes += kVector;
        q += 4;
      }
      unroll<T * kSubs>([&](auto i) FQ_LAMBDA {
        constexpr int t = i / kSubs, s = i % kSubs;
        const GroupScales<V> pair(a, p.tile + t, s, g);
        unroll<R>([&](auto r) FQ_LAMBDA {
          const float* xs = x.pairs + ((row + r) * x.groups + g) * 2;
          const auto sum = V::template finish<kFull>(acc[r][t][s], xs[1]);
          total[r][t][s] = pair.add(total[r][t][s], sum, xs[0], xs[1]);
        });
      });
    }
    unroll<kCount>([&](auto i) FQ_LAMBDA {
      constexpr int r = i / (T * kSubs), t = i / kSubs % T, s = i % kSubs;
      if (p.k_end == a.k) {
        store_outputs<V>(a, row + r, p.tile + t, s, total[r][t][s]);
      } else {
        V::store_f(carry + (r * T + t) * kTile + s * V::kLanes, total[r][t][s]);
      }
    });
  }
};

template <class Gemm>
struct GemmPlan {
  int64_t row_block;  // rows whose quantized activations stay in L2
  int64_t panel_k;    // k per panel
  size_t panel_bytes, carry_bytes;

  explicit GemmPlan(const LinearArgs& a) {
    row_block = kRowBytes / a.k / Gemm::kRows * Gemm::kRows;
    if (row_block < Gemm::kRows) row_block = Gemm::kRows;
    if (row_block > a.rows) row_block = a.rows;
    panel_k = a.k < Gemm::kPanelK ? a.k : Gemm::kPanelK;
    panel_bytes = align_lines(size_t(Gemm::kTiles) * kTile * panel_k);
    carry_bytes = align_lines(size_t(row_block) * Gemm::kTiles * kTile * sizeof(float));
  }
};

// Sets of Gemm::kTiles tiles [begin, end) for every row.
template <class Gemm, class L, int P>
void gemm_sets(const LinearArgs& a, const Activations& x, const GemmPlan<Gemm>& plan, uint8_t* scratch, int64_t begin,
               int64_t end) {
  using V = typename Gemm::Simd;
  const int64_t all = (a.n + kTile - 1) / kTile;
  float* carry = reinterpret_cast<float*>(scratch + plan.panel_bytes);
  Gemm::enter(a);
  for (int64_t row = 0; row < a.rows; row += plan.row_block) {
    const int64_t row_end = row + plan.row_block < a.rows ? row + plan.row_block : a.rows;
    for (int64_t tile = begin * Gemm::kTiles; tile < end * Gemm::kTiles && tile < all;) {
      // The last set may have fewer tiles, which then come one by one.
      const int64_t tiles = tile + Gemm::kTiles <= all ? Gemm::kTiles : 1;
      for (int64_t k = 0; k < a.k; k += plan.panel_k) {
        const int64_t k_end = k + plan.panel_k < a.k ? k + plan.panel_k : a.k, blocks = (k_end - k) / kBlock;
        for (int64_t t = 0; t < tiles; ++t) {
          unpack_panel<V, L, P>(a, tile + t, k / kBlock, blocks, scratch + t * blocks * 8 * kVector);
        }
        Panel panel{scratch, carry, tile, tiles, k, k_end, L::begin(P) == 8, {}, {}, P};
        unroll<P>([&](auto p) FQ_LAMBDA {
          panel.next[p] = a.planes[p] + (tile * a.k + k_end) * L::width[p] * 2;
          panel.next_lines[p] = a.group * L::width[p] * 2 / kVector;
        });
        Gemm::multiply(a, x, panel, row, row_end);
      }
      tile += tiles;
    }
  }
  Gemm::leave();
}

// One buffer per calling thread, whatever the layout and width.
uint8_t* linear_scratch(size_t bytes) {
  thread_local Scratch scratch;
  return scratch.reserve(bytes);
}

template <class Gemm, class L, int P>
void run(const LinearArgs& a) {
  using V = typename Gemm::Simd;
  const int64_t groups = a.k / a.group, tiles = (a.n + kTile - 1) / kTile;
  const bool fused = a.rows <= Gemm::kFusedRows;
  // Threads take pairs of tiles, so that no two write to one cache line of a row.
  const int64_t set = fused || Gemm::kTiles == 1 ? 2 : Gemm::kTiles;
  const int64_t parts = (tiles + set - 1) / set;
  const int threads = thread_count(tiles * kTile * a.k, kGrain, parts, a.max_threads);
  const bool quantize_apart = threads == 1 || a.rows == 1 || a.rows * a.k < 2 * kQuantizeGrain;

  const GemmPlan<Gemm> plan(a);
  const size_t per_thread = fused ? 0 : plan.panel_bytes + plan.carry_bytes;
  const bool blocks = !fused && Gemm::kBlocks;
  const int64_t rows = blocks ? round_up(a.rows, 16) : a.rows;
  const size_t q_bytes = align_lines(size_t(rows) * a.k);
  const size_t pair_bytes = align_lines(size_t(rows) * groups * 2 * sizeof(float));
  uint8_t* memory = linear_scratch(q_bytes + pair_bytes + threads * per_thread);
  const Activations x{reinterpret_cast<int8_t*>(memory), reinterpret_cast<float*>(memory + q_bytes), a.k, groups,
                      blocks};
  uint8_t* panels = memory + q_bytes + pair_bytes;

  const auto multiply = [&](int64_t index, int64_t count) {
    const Part part(parts, index, count);
    if (!fused) {
      const int64_t factor = set / Gemm::kTiles;
      return gemm_sets<Gemm, L, P>(a, x, plan, panels + index * per_thread, part.begin * factor, part.end * factor);
    }
    const int64_t end = part.end * set < tiles ? part.end * set : tiles;
    unroll<Gemm::kFusedRows>([&](auto r) FQ_LAMBDA {
      if (a.rows == r + 1) fused_tiles<V, L, P, r + 1>(a, x, part.begin * set, end);
    });
  };

  if (quantize_apart) quantize_rows<V>(a, 0, a.rows, x);
  if (threads == 1) return multiply(0, 1);
#pragma omp parallel num_threads(threads)
  {
    // The runtime may grant fewer threads than asked; scratch was sized for all of them.
    const int index = omp_get_thread_num(), count = omp_get_num_threads();
    if (!quantize_apart) {
      const Part part(a.rows, index, count);
      quantize_rows<V>(a, part.begin, part.end, x);
#pragma omp barrier
    }
    multiply(index, count);
  }
}

template <class Gemm>
void run_layout(const LinearArgs& a) {
  using L422 = Layout<4, 2, 2>;
  using L224 = Layout<2, 2, 4>;
  using L21122 = Layout<2, 1, 1, 2, 2>;
  switch (a.layout) {
    case LayoutId::k422:
      return a.planes_used == 1   ? run<Gemm, L422, 1>(a)
             : a.planes_used == 2 ? run<Gemm, L422, 2>(a)
                                  : run<Gemm, L422, 3>(a);
    case LayoutId::k224:
      return a.planes_used == 1   ? run<Gemm, L224, 1>(a)
             : a.planes_used == 2 ? run<Gemm, L224, 2>(a)
                                  : run<Gemm, L224, 3>(a);
    case LayoutId::k21122:
      switch (a.planes_used) {
        case 1: return run<Gemm, L21122, 1>(a);
        case 2: return run<Gemm, L21122, 2>(a);
        case 3: return run<Gemm, L21122, 3>(a);
        case 4: return run<Gemm, L21122, 4>(a);
        default: return run<Gemm, L21122, 5>(a);
      }
    case LayoutId::kUnsupported: return;
  }
}

// Rows in chunks whose quantized activations fit the scratch memory.
template <class Gemm>
void linear_in_chunks(const LinearArgs& a) {
  if (a.rows == 0 || a.n == 0) return;
  int64_t chunk = kChunkBytes / a.k / 16 * 16;
  if (chunk < 16) chunk = 16;
  const size_t size = a.dtype == Dtype::kFloat ? 4 : 2;
  for (int64_t row = 0; row < a.rows; row += chunk) {
    LinearArgs part = a;
    part.rows = row + chunk < a.rows ? chunk : a.rows - row;
    part.x = static_cast<const char*>(a.x) + row * a.k * size;
    part.out = static_cast<char*>(a.out) + row * a.n * size;
    run_layout<Gemm>(part);
  }
}

}  // namespace
}  // namespace flexquant
