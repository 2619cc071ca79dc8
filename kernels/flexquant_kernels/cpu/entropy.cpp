// SPDX-License-Identifier: Apache-2.0
// Shannon entropy of softmax, in nats, reading each logit from memory once.
//
// Rows are cut into chunks of fixed length. A chunk yields its maximum m, s = sum e^(x-m) and
// t = sum (x-m) e^(x-m); chunks are merged in ascending order, so results depend on no thread count.
#include <cmath>

#include "simd.h"

#if defined(__x86_64__)

namespace flexquant {
namespace {

constexpr int64_t kChunk = 4096;      // 16 KiB of fp32, within L1
constexpr int64_t kGrain = 16 << 10;  // logits worth a thread

struct Partial {
  float max, sum, moment;
  bool invalid;  // a NaN or +inf was seen
};

// e^d for d in [-87, 0], relative error about 1e-7.
FQ_INLINE __m512 exp_nonpositive(__m512 d) {
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(d, _mm512_set1_ps(1.44269504f)),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.62e4p-1f), d);              // ln 2, leading bits
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);                   // ln 2, the rest
  __m512 y = _mm512_set1_ps(1.0f / 720.0f);
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f / 120.0f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f / 24.0f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f / 6.0f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.5f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(y, n);
}

template <Dtype D>
Partial reduce_chunk(const void* logits, int64_t at, int64_t count) {
  const __m512 lowest = _mm512_set1_ps(-__builtin_inff());
  __m512 top = lowest;
  __mmask16 nan = 0;
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 lanes = first_lanes(count - i);
    const __m512 v = load16<D>(logits, at + i, lanes);
    nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    top = _mm512_mask_max_ps(top, lanes, top, v);
  }
  const float max = _mm512_reduce_max_ps(top);
  if (nan || max == __builtin_inff()) return {0.0f, 0.0f, 0.0f, true};
  if (max == -__builtin_inff()) return {max, 0.0f, 0.0f, false};

  const __m512 shift = _mm512_set1_ps(max), floor = _mm512_set1_ps(-87.0f);
  __m512 sum = _mm512_setzero_ps(), moment = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 lanes = first_lanes(count - i);
    __m512 d = _mm512_sub_ps(load16<D>(logits, at + i, lanes), shift);
    // Below e^-87 the term vanishes in fp32, and -inf would give 0 * inf.
    const __mmask16 live = _mm512_mask_cmp_ps_mask(lanes, d, floor, _CMP_GE_OQ);
    d = _mm512_maskz_mov_ps(live, d);
    const __m512 e = _mm512_maskz_mov_ps(live, exp_nonpositive(d));
    sum = _mm512_add_ps(sum, e);
    moment = _mm512_fmadd_ps(d, e, moment);
  }
  return {max, _mm512_reduce_add_ps(sum), _mm512_reduce_add_ps(moment), false};
}

Partial reduce(const EntropyArgs& a, int64_t row, int64_t begin, int64_t end) {
  const int64_t at = row * a.vocab + begin;
  switch (a.dtype) {
    case Dtype::kFloat: return reduce_chunk<Dtype::kFloat>(a.logits, at, end - begin);
    case Dtype::kBFloat16: return reduce_chunk<Dtype::kBFloat16>(a.logits, at, end - begin);
    default: return reduce_chunk<Dtype::kHalf>(a.logits, at, end - begin);
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

}  // namespace

void entropy(const EntropyArgs& a) {
  const int64_t chunks = (a.vocab + kChunk - 1) / kChunk, parts = a.rows * chunks;
  if (a.rows == 0) return;
  if (chunks == 0) {
    for (int64_t row = 0; row < a.rows; ++row) a.out[row] = __builtin_nanf("");
    return;
  }
  thread_local Scratch scratch;
  Partial* partial = reinterpret_cast<Partial*>(scratch.reserve(size_t(parts) * sizeof(Partial)));
  const int threads = thread_count(a.rows * a.vocab, kGrain, parts, a.max_threads);
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t start = i % chunks * kChunk;
      partial[i] = reduce(a, i / chunks, start, start + kChunk < a.vocab ? start + kChunk : a.vocab);
    }
  };
  if (threads == 1) {
    work(0, parts);
  } else {
#pragma omp parallel num_threads(threads)
    {
      const int64_t index = omp_get_thread_num(), count = omp_get_num_threads();
      work(parts * index / count, parts * (index + 1) / count);
    }
  }
  for (int64_t row = 0; row < a.rows; ++row) a.out[row] = merge(partial + row * chunks, chunks);
}

}  // namespace flexquant

FQ_TARGET_END

#else

namespace flexquant {
void entropy(const EntropyArgs&) {}
}  // namespace flexquant

#endif  // __x86_64__
