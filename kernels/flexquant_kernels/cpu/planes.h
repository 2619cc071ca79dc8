// SPDX-License-Identifier: Apache-2.0
// What all linear kernels share: codes out of planes, int8 activations, and the fp32 chain of an output.
#pragma once

#include "unroll.h"

namespace flexquant {
namespace {

constexpr float kMinAmax = 0x1p-100f;  // as MIN_AMAX in reference.py
constexpr int64_t kAhead = 2048;       // bytes of each plane fetched ahead of their use

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

// The first P planes of one tile.
template <class L, int P>
struct Planes {
  const uint8_t* at[P];

  FQ_INLINE Planes(const LinearArgs& a, int64_t tile) {
    unroll<P>([&](auto p) FQ_LAMBDA { at[p] = a.planes[p] + tile * a.k * L::width[p] * 2; });
  }

  // Of a block that is read once: asks for the block kAhead further on.
  FQ_INLINE void prefetch(int64_t block) const {
    unroll<P>([&](auto p) FQ_LAMBDA {
      constexpr int w = L::width[p];
      unroll<w>([&](auto j) FQ_LAMBDA { __builtin_prefetch(at[p] + (block * w + j) * kVector + kAhead); });
    });
  }
};

// What codes are put together from: a plane, or two neighbours of one width w that were merged to fields of 2w bits.
struct Source {
  int plane;
  bool merged;
};

template <class L, int P>
struct Sources {
  int count = 0;
  Source at[P] = {};

  constexpr Sources() {
    for (int p = 0; p < P; ++p) {
      const bool merged = p + 1 < P && L::width[p] == L::width[p + 1];
      at[count++] = {p, merged};
      p += merged;
    }
  }
};

// 32 k of the output rows [sub * kLanes, (sub + 1) * kLanes) of a tile: begin(P) vectors in, 8 of codes out.
template <class V, class L, int P>
struct Block {
  static constexpr bool kFull = L::begin(P) == 8;
  static constexpr Sources<L, P> kSources{};
  typename V::I packed[L::begin(P)];

  FQ_INLINE Block(const Planes<L, P>& planes, int64_t block, int sub) {
    unroll<P>([&](auto p) FQ_LAMBDA {
      constexpr int w = L::width[p];
      unroll<w>([&](auto j) FQ_LAMBDA {
        packed[L::begin(p) + j] = V::load(planes.at[p] + (block * w + j) * kVector + sub * V::kLanes * 4);
      });
    });
    unroll<kSources.count>([&](auto s) FQ_LAMBDA {
      constexpr Source source = kSources.at[s];
      if constexpr (source.merged) merge_planes<L::width[source.plane], L::begin(source.plane)>();
    });
  }

  template <int Q>
  FQ_INLINE typename V::I codes() const {
    typename V::I code = V::zero();
    unroll<kSources.count>([&](auto s) FQ_LAMBDA {
      constexpr Source source = kSources.at[s];
      constexpr int w = L::width[source.plane], field = Q % (8 / w);
      constexpr int bits = source.merged ? 2 * w : w, bit = source.merged ? field / 2 * 2 * w : field * w;
      constexpr int vector = L::begin(source.plane) + Q / (8 / w) + (source.merged && field % 2 ? w : 0);
      constexpr int target = L::begin(P) - L::begin(source.plane) - bits, shift = bit - target;
      typename V::I v = packed[vector];
      // Shifts may be of 16 bits: what crossed over is dropped below.
      if constexpr (shift > 0) v = V::template shift_right<shift>(v);
      if constexpr (shift < 0) v = V::template shift_left<-shift>(v);
      if constexpr (s == 0) {
        code = kFull ? v : V::mask(v, ((1 << bits) - 1) << target);
      } else if constexpr (kFull) {
        code = V::select((1 << (bits + target)) - 1, v, code);  // what lies below is replaced by the next
      } else {
        code = V::merge(v, ((1 << bits) - 1) << target, code);
      }
    });
    return code;
  }

 private:
  // Planes of W bits from vectors kFirst and kFirst + W on: even fields of 2W bits to the first, odd to the second.
  template <int W, int kFirst>
  FQ_INLINE void merge_planes() {
    constexpr uint8_t low = W == 1 ? 0x55 : W == 2 ? 0x33 : 0x0F;
    unroll<W>([&](auto i) FQ_LAMBDA {
      const auto high = packed[kFirst + i], rest = packed[kFirst + W + i];
      packed[kFirst + i] = V::select(low, rest, V::template shift_left<W>(high));
      packed[kFirst + W + i] = V::select(low, V::template shift_right<W>(rest), high);
    });
  }
};

// Scale and offset of one group for kLanes output rows.
template <class V>
struct GroupScales {
  typename V::F scale, offset;

  FQ_INLINE GroupScales(const LinearArgs& a, int64_t tile, int sub, int64_t group) {
    const uint16_t* pair = a.scales + (tile * (a.k / a.group) + group) * 2 * kTile;
    const auto s = V::template load_as<Dtype::kHalf>(pair, sub * V::kLanes);
    const auto o = V::template load_as<Dtype::kHalf>(pair, kTile + sub * V::kLanes);
    scale = V::mul(s, V::set(a.step));
    offset = V::fma(s, V::set((a.step - 1.0f) * 0.5f), o);
  }

  // The one place where an output's fp32 chain is written down: `sum` is of codes x activations, sx and sq are
  // the group's activation scale and the sum of its int8 activations.
  FQ_INLINE typename V::F add(typename V::F total, typename V::I sum, float sx, float sq) const {
    const auto inner = V::fma(scale, V::to_float(sum), V::mul(offset, V::set(sq)));
    return V::fma(V::set(sx), inner, total);
  }
};

// Adds the bias to one row of a tile and writes it out in the dtype of the call.
template <class V>
__attribute__((noinline)) void store_outputs(const LinearArgs& a, int64_t row, int64_t tile, int sub, typename V::F total) {
  const int64_t column = tile * kTile + sub * V::kLanes, count = a.n - column, at = row * a.n + column;
  if (a.bias != nullptr) {
    switch (a.bias_dtype) {
      case Dtype::kFloat: total = V::add(total, V::template load_as<Dtype::kFloat>(a.bias, column, count)); break;
      case Dtype::kBFloat16: total = V::add(total, V::template load_as<Dtype::kBFloat16>(a.bias, column, count)); break;
      default: total = V::add(total, V::template load_as<Dtype::kHalf>(a.bias, column, count)); break;
    }
  }
  switch (a.dtype) {
    case Dtype::kFloat: return V::template store_as<Dtype::kFloat>(a.out, at, total, count);
    case Dtype::kBFloat16: return V::template store_as<Dtype::kBFloat16>(a.out, at, total, count);
    default: return V::template store_as<Dtype::kHalf>(a.out, at, total, count);
  }
}

// Quantized activations. As rows: q [rows][k], pairs [rows][groups][2] of (scale, sum of q). As blocks of 16
// rows, which are the operands of a matrix unit: q [blocks][k / step][16][step], pairs [blocks][groups][2][16],
// where step is 64, or the group when it is smaller.
struct Activations {
  int8_t* q;
  float* pairs;
  int64_t k, groups;
  bool blocks;
};

// One row of x to int8, group by group of G: q = round(x * 127 / amax). A group with an infinity or a NaN gets the
// scale NaN, one of nothing but tiny values is zero.
template <class V, Dtype D, int G>
void quantize_row(const LinearArgs& a, int64_t row, const Activations& to) {
  constexpr int L = V::kLanes, kStep = G < 64 ? G : 64;
  const int64_t inside = row % 16;
  int8_t* q = to.blocks ? to.q + (row - inside) * a.k + inside * kStep : to.q + row * a.k;
  float* pair = to.blocks ? to.pairs + (row - inside) * to.groups * 2 + inside : to.pairs + row * to.groups * 2;
  const int64_t q_stride = to.blocks ? G * 16 : G, half_stride = to.blocks ? 16 * 64 : 64;
  const int64_t pair_stride = to.blocks ? 32 : 2, to_sum = to.blocks ? 16 : 1;
  int64_t at = row * a.k;
  for (int64_t g = 0; g < to.groups; ++g, at += G, q += q_stride, pair += pair_stride) {
    // Magnitudes order like their bit patterns, with infinity and then NaN above every finite number.
    auto top = V::zero();
    unroll<G / L>([&](auto i) FQ_LAMBDA { top = V::max_magnitude(top, V::template load_as<D>(a.x, at + i * L)); });
    const int32_t bits = V::reduce_max(top);
    float amax;
    __builtin_memcpy(&amax, &bits, 4);
    if (__builtin_expect(bits >= 0x7F800000 || amax < kMinAmax, 0)) {
      unroll<G / L>([&](auto i) FQ_LAMBDA { V::store_int8(q + i * L / 64 * half_stride + i * L % 64, V::zero()); });
      pair[0] = bits >= 0x7F800000 ? __builtin_nanf("") : 0.0f;
      pair[to_sum] = 0.0f;
      continue;
    }
    const auto inverse = V::set(127.0f / amax);
    auto total = V::zero();
    unroll<G / L>([&](auto i) FQ_LAMBDA {
      const auto v = V::round_to_int(V::mul(V::template load_as<D>(a.x, at + i * L), inverse));
      total = V::add(total, v);
      V::store_int8(q + i * L / 64 * half_stride + i * L % 64, v);
    });
    pair[0] = amax / 127.0f;
    pair[to_sum] = static_cast<float>(V::reduce_add(total));
  }
}

template <class V, Dtype D>
void quantize_rows_of(const LinearArgs& a, int64_t begin, int64_t end, const Activations& to) {
  for (int64_t row = begin; row < end; ++row) {
    switch (a.group) {
      case 32: quantize_row<V, D, 32>(a, row, to); break;
      case 64: quantize_row<V, D, 64>(a, row, to); break;
      default: quantize_row<V, D, 128>(a, row, to); break;
    }
  }
}

template <class V>
void quantize_rows(const LinearArgs& a, int64_t begin, int64_t end, const Activations& to) {
  switch (a.dtype) {
    case Dtype::kFloat: return quantize_rows_of<V, Dtype::kFloat>(a, begin, end, to);
    case Dtype::kBFloat16: return quantize_rows_of<V, Dtype::kBFloat16>(a, begin, end, to);
    default: return quantize_rows_of<V, Dtype::kHalf>(a, begin, end, to);
  }
}

}  // namespace
}  // namespace flexquant
