// SPDX-License-Identifier: Apache-2.0
// Runs the kernels without torch, so that they can be cross-compiled, run under an emulator, and handed memory
// that ends where a page begins that may not be touched.
//
//     driver isas                      the instruction sets of this machine, comma-separated
//     driver overrun                   reads one byte too many; must be killed
//     driver ISA INPUT OUTPUT          the cases of INPUT (written by test_emulated.py), their outputs to OUTPUT
//
// Every case runs twice: each buffer flush with the end of its pages, then with their beginning.
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "isa.h"
#include "kernels.h"

extern "C" const char* flexquant_supported_isas();
extern "C" int flexquant_select_isa(const char* name);

namespace {

using namespace flexquant;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "driver: %s\n", what);
  std::exit(2);
}

constexpr size_t kPage = 4096;

// `size` bytes between two pages that fault, at the end or at the beginning of what lies between them.
class Guarded {
 public:
  Guarded(size_t size, bool at_end) : size_(size), inner_((size + kPage - 1) / kPage * kPage) {
    void* mapped = mmap(nullptr, inner_ + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) fail("no memory");
    base_ = static_cast<unsigned char*>(mapped);
    if (inner_ != 0 && mprotect(base_ + kPage, inner_, PROT_READ | PROT_WRITE) != 0) fail("mprotect");
    std::memset(base_ + kPage, kPoison, inner_);
    data_ = base_ + kPage + (at_end ? inner_ - size : 0);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { munmap(base_, inner_ + 2 * kPage); }

  unsigned char* data() const { return data_; }
  size_t size() const { return size_; }

  // What was not asked for on the pages of the buffer is as it was.
  bool margins_untouched() const {
    for (const unsigned char* p = base_ + kPage; p < base_ + kPage + inner_; ++p) {
      if ((p < data_ || p >= data_ + size_) && *p != kPoison) return false;
    }
    return true;
  }

 private:
  static constexpr int kPoison = 0xA5;
  size_t size_, inner_;
  unsigned char *base_, *data_;
};

class Reader {
 public:
  explicit Reader(const char* path) : file_(std::fopen(path, "rb")) {
    if (file_ == nullptr) fail("cannot open the input");
  }
  ~Reader() { std::fclose(file_); }

  bool number(int64_t& value) { return std::fread(&value, sizeof value, 1, file_) == 1; }
  int64_t number() {
    int64_t value;
    if (!number(value)) fail("the input ends too early");
    return value;
  }
  std::vector<unsigned char> bytes() {
    std::vector<unsigned char> read(static_cast<size_t>(number()));
    if (!read.empty() && std::fread(read.data(), read.size(), 1, file_) != 1) fail("the input ends too early");
    return read;
  }

 private:
  std::FILE* file_;
};

size_t element_size(Dtype dtype) { return dtype == Dtype::kFloat ? 4 : 2; }

// The inputs of one case in memory of their own, and room for the output.
class Memory {
 public:
  explicit Memory(bool at_end) : at_end_(at_end) {}

  const unsigned char* put(const std::vector<unsigned char>& bytes) {
    Guarded& made = add(bytes.size());
    if (!bytes.empty()) std::memcpy(made.data(), bytes.data(), bytes.size());
    return made.data();
  }
  Guarded& add(size_t size) {
    blocks_.push_back(std::make_unique<Guarded>(size, at_end_));
    return *blocks_.back();
  }
  void check() const {
    for (const auto& block : blocks_) {
      if (!block->margins_untouched()) fail("wrote outside of a buffer");
    }
  }

 private:
  bool at_end_;
  std::vector<std::unique_ptr<Guarded>> blocks_;
};

struct Case {
  bool is_entropy;
  int64_t dtype, bias_dtype, layout, planes_used, rows, k, n, group, threads, step;
  std::vector<std::vector<unsigned char>> buffers;  // logits; or x, bias, scales, planes

  bool read(Reader& in) {
    int64_t op;
    if (!in.number(op)) return false;
    is_entropy = op == 1;
    for (int64_t* field : {&dtype, &bias_dtype, &layout, &planes_used, &rows, &k, &n, &group, &threads, &step}) {
      *field = in.number();
    }
    buffers.resize(static_cast<size_t>(in.number()));
    for (auto& buffer : buffers) buffer = in.bytes();
    return true;
  }

  std::vector<unsigned char> run(bool at_end) const {
    Memory memory(at_end);
    const Guarded& out = memory.add(static_cast<size_t>(rows) * (is_entropy ? 4 : n * element_size(Dtype(dtype))));
    if (is_entropy) {
      entropy({memory.put(buffers[0]), reinterpret_cast<float*>(out.data()), Dtype(dtype), rows, k,
               static_cast<int>(threads)});
    } else {
      LinearArgs a{};
      a.x = memory.put(buffers[0]);
      a.out = out.data();
      a.dtype = Dtype(dtype);
      a.bias = bias_dtype < 0 ? nullptr : memory.put(buffers[1]);
      a.bias_dtype = bias_dtype < 0 ? Dtype::kFloat : Dtype(bias_dtype);
      a.scales = reinterpret_cast<const uint16_t*>(memory.put(buffers[2]));
      for (int i = 0; i < planes_used; ++i) a.planes[i] = memory.put(buffers[3 + i]);
      a.step = static_cast<float>(step);
      a.layout = LayoutId(layout);
      a.planes_used = static_cast<int>(planes_used);
      a.rows = rows;
      a.k = k;
      a.n = n;
      a.group = group;
      a.max_threads = static_cast<int>(threads);
      linear(a);
    }
    memory.check();
    return {out.data(), out.data() + out.size()};
  }
};

}  // namespace

int main(int count, char** arguments) {
  if (count == 2 && std::strcmp(arguments[1], "isas") == 0) {
    std::puts(flexquant_supported_isas());
    return 0;
  }
  if (count == 2 && std::strcmp(arguments[1], "overrun") == 0) {
    const Guarded buffer(100, true);
    return *const_cast<volatile unsigned char*>(buffer.data() + buffer.size());
  }
  if (count != 4) fail("usage: driver isas | overrun | ISA INPUT OUTPUT");
  if (flexquant_select_isa(arguments[1]) == 0) fail("the instruction set is not supported");
  Reader in(arguments[2]);
  std::FILE* file = std::fopen(arguments[3], "wb");
  if (file == nullptr) fail("cannot write the output");
  for (Case one; one.read(in);) {
    const std::vector<unsigned char> result = one.run(true);
    if (result != one.run(false)) fail("the output depends on where the buffers lie");
    if (!result.empty() && std::fwrite(result.data(), result.size(), 1, file) != 1) fail("cannot write the output");
  }
  if (std::fclose(file) != 0) fail("cannot write the output");
  return 0;
}
