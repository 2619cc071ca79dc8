// SPDX-License-Identifier: Apache-2.0
// The yardstick of memory: reads every byte once and does nothing else with it.
#include <omp.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

typedef uint64_t Vector __attribute__((vector_size(64)));
constexpr int kSums = 8;  // so that no addition waits for another

// S streams, each a contiguous part: some memory systems give one core more than a single stream takes.
template <int S>
uint64_t sum(const uint8_t* bytes, size_t count) {
  constexpr int kWide = kSums / S;
  constexpr size_t kStep = kWide * sizeof(Vector);
  const size_t part = count / (S * kStep) * kStep;
  Vector sums[kSums] = {};
  for (size_t at = 0; at < part; at += kStep) {
    for (int i = 0; i < kSums; ++i) {
      Vector v;
      std::memcpy(&v, bytes + i / kWide * part + at + i % kWide * sizeof(Vector), sizeof(Vector));
      sums[i] += v;
    }
  }
  uint64_t total = 0;
  for (const Vector& v : sums) {
    for (int i = 0; i < 8; ++i) total += v[i];
  }
  for (size_t at = part * S; at < count; ++at) total += bytes[at];  // what does not fill a step of each stream
  return total;
}

uint64_t sum(const uint8_t* bytes, size_t count, int streams) {
  switch (streams) {
    case 1: return sum<1>(bytes, count);
    case 2: return sum<2>(bytes, count);
    case 4: return sum<4>(bytes, count);
    default: return sum<8>(bytes, count);
  }
}

}  // namespace

// Each thread reads one contiguous part of `bytes`, in 1, 2, 4 or 8 streams.
extern "C" __attribute__((visibility("default"))) uint64_t plain_read(const uint8_t* bytes, size_t count, int threads,
                                                                       int streams) {
  if (threads == 1) return sum(bytes, count, streams);
  const size_t lines = count / 64;
  uint64_t total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
  {
    const size_t index = omp_get_thread_num(), parts = omp_get_num_threads();
    const size_t begin = lines * index / parts * 64;
    const size_t end = index + 1 == parts ? count : lines * (index + 1) / parts * 64;
    total += sum(bytes + begin, end - begin, streams);
  }
  return total;
}
