// SPDX-License-Identifier: Apache-2.0
// Shannon entropy of softmax, in nats, reading each logit from memory once: the flow that all instruction sets share.
//
// Rows are cut into chunks of fixed length. A chunk yields its maximum m, s = sum e^(x-m) and
// t = sum (x-m) e^(x-m); chunks are merged in ascending order, so results depend on no thread count.
#pragma once

#include "unroll.h"

namespace flexquant {
namespace {

constexpr int64_t kChunk = 4096;              // 16 KiB of fp32, within L1
constexpr int64_t kEntropyGrain = 16 << 10;   // logits worth a thread

struct Partial {
  float max, sum, moment;
  bool invalid;  // a NaN or +inf was seen
};

// e^d for d in [-87, 0], relative error about 1e-7.
template <class V>
FQ_INLINE typename V::F exp_nonpositive(typename V::F d) {
  const auto n = V::nearest(V::mul(d, V::set(1.44269504f)));
  auto r = V::fma(n, V::set(-0x1.62e4p-1f), d);     // ln 2, leading bits
  r = V::fma(n, V::set(-1.42860677e-6f), r);        // ln 2, the rest
  auto y = V::set(1.0f / 720.0f);
  y = V::fma(y, r, V::set(1.0f / 120.0f));
  y = V::fma(y, r, V::set(1.0f / 24.0f));
  y = V::fma(y, r, V::set(1.0f / 6.0f));
  y = V::fma(y, r, V::set(0.5f));
  y = V::fma(y, r, V::set(1.0f));
  y = V::fma(y, r, V::set(1.0f));
  return V::scale_by_power(y, n);
}

template <class V, Dtype D>
Partial reduce_chunk(const void* logits, int64_t at, int64_t count) {
  const auto lowest = V::set(-__builtin_inff());
  auto top = lowest;
  auto magnitude = V::zero();
  // whole vectors first: their loads need no mask
  const int64_t whole = count / V::kLanes * V::kLanes;
  for (int64_t i = 0; i < whole; i += V::kLanes) {
    const auto v = V::template load_as<D>(logits, at + i);
    magnitude = V::max_magnitude(magnitude, v);
    top = V::max(top, v);
  }
  if (whole < count) {
    const auto v = V::template load_as<D>(logits, at + whole, count - whole);
    magnitude = V::max_magnitude(magnitude, v);
    top = V::max(top, V::fill_past(v, count - whole, lowest));
  }
  const float max = V::reduce_max(top);
  const bool nan = V::reduce_max(magnitude) > 0x7F800000;  // of the bits of +inf
  if (nan || max == __builtin_inff()) return {0.0f, 0.0f, 0.0f, true};
  if (max == -__builtin_inff()) return {max, 0.0f, 0.0f, false};

  const auto shift = V::set(max), floor = V::set(-87.0f);
  auto sum = V::zero_f(), moment = V::zero_f();
  const auto add = [&](typename V::F v) FQ_LAMBDA {
    // Below e^-87 the term vanishes in fp32, and -inf would give 0 * inf.
    const auto far = V::sub(v, shift), d = V::max(far, floor);
    const auto e = V::keep_at_least(far, floor, exp_nonpositive<V>(d));
    sum = V::add(sum, e);
    moment = V::fma(d, e, moment);
  };
  for (int64_t i = 0; i < whole; i += V::kLanes) add(V::template load_as<D>(logits, at + i));
  if (whole < count) {
    add(V::fill_past(V::template load_as<D>(logits, at + whole, count - whole), count - whole, lowest));
  }
  return {max, V::reduce_add(sum), V::reduce_add(moment), false};
}

template <class V>
Partial reduce(const EntropyArgs& a, int64_t row, int64_t begin, int64_t end) {
  const int64_t at = row * a.vocab + begin;
  switch (a.dtype) {
    case Dtype::kFloat: return reduce_chunk<V, Dtype::kFloat>(a.logits, at, end - begin);
    case Dtype::kBFloat16: return reduce_chunk<V, Dtype::kBFloat16>(a.logits, at, end - begin);
    default: return reduce_chunk<V, Dtype::kHalf>(a.logits, at, end - begin);
  }
}

float merge(const Partial* partial, int64_t count) {
  double max = -__builtin_inf();
  for (int64_t i = 0; i < count; ++i) {
    if (partial[i].invalid) return __builtin_nanf("");
    if (partial[i].max > max) max = partial[i].max;
  }
  if (max == -__builtin_inf()) return __builtin_nanf("");
  double sum = 0.0, moment = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    if (partial[i].sum == 0.0f) continue;
    const double shift = partial[i].max - max, factor = ::exp(shift);
    sum += factor * partial[i].sum;
    moment += factor * (partial[i].moment + shift * partial[i].sum);
  }
  const double value = ::log(sum) - moment / sum;
  return static_cast<float>(value > 0.0 ? value : 0.0);  // rounding may leave a certain row just below zero
}

template <class V>
void run_entropy(const EntropyArgs& a) {
  const int64_t chunks = (a.vocab + kChunk - 1) / kChunk, parts = a.rows * chunks;
  if (a.rows == 0) return;
  if (chunks == 0) {
    for (int64_t row = 0; row < a.rows; ++row) a.out[row] = __builtin_nanf("");
    return;
  }
  thread_local Scratch scratch;
  Partial* partial = reinterpret_cast<Partial*>(scratch.reserve(size_t(parts) * sizeof(Partial)));
  const int threads = thread_count(a.rows * a.vocab, kEntropyGrain, parts, a.max_threads);
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t start = i % chunks * kChunk;
      partial[i] = reduce<V>(a, i / chunks, start, start + kChunk < a.vocab ? start + kChunk : a.vocab);
    }
  };
  if (threads == 1) {
    work(0, parts);
  } else {
#pragma omp parallel num_threads(threads)
    {
      const Part part(parts, omp_get_thread_num(), omp_get_num_threads());
      work(part.begin, part.end);
    }
  }
  for (int64_t row = 0; row < a.rows; ++row) a.out[row] = merge(partial + row * chunks, chunks);
}

}  // namespace
}  // namespace flexquant
