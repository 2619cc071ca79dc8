// SPDX-License-Identifier: Apache-2.0
// Shared by the sources of all instruction sets, before they raise their target.
//
// Those sources are compiled for the plain architecture and raise the target from there on, so nothing
// that other translation units could share (std templates) may be included after a simd_*.h.
#pragma once

#include <omp.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "kernels.h"

#define FQ_INLINE __attribute__((always_inline)) inline
#define FQ_LAMBDA __attribute__((always_inline))

namespace flexquant {

// Memory of the calling thread that grows and is kept between calls.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  uint8_t* reserve(size_t bytes) {
    if (bytes > size_) {
      const size_t rounded = (bytes + 4095) / 4096 * 4096;
      void* grown = std::aligned_alloc(4096, rounded);
      if (grown == nullptr) throw std::bad_alloc();
      std::free(data_);
      data_ = static_cast<uint8_t*>(grown);
      size_ = rounded;
    }
    return data_;
  }

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

// To whole pairs of cache lines, which the hardware fetches together: parts of threads share none.
constexpr size_t align_lines(size_t bytes) { return (bytes + 127) / 128 * 128; }

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Threads worth starting: each gets at least `grain` units of `work`, and no more threads than parts.
inline int thread_count(int64_t work, int64_t grain, int64_t parts, int max_threads) {
  if (omp_in_parallel()) return 1;
  int64_t threads = work / grain;
  if (threads > parts) threads = parts;
  if (threads > max_threads) threads = max_threads;
  return threads < 1 ? 1 : static_cast<int>(threads);
}

struct Part {
  int64_t begin, end;
  Part(int64_t total, int64_t index, int64_t count) : begin(total * index / count), end(total * (index + 1) / count) {}
};

}  // namespace flexquant
