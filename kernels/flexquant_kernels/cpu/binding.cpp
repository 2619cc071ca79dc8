// SPDX-License-Identifier: Apache-2.0
// CPU implementations of the flexquant:: operators. Schemas, fakes and the reference live in ops.py; what
// the kernels do not cover goes to flexquant::linear_reference.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>
#include <optional>

#include "isa.h"
#include "kernels.h"

namespace flexquant {
namespace {

using at::Tensor;

std::atomic<long long> clamped_calls{0};

std::optional<Dtype> to_dtype(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return Dtype::kFloat;
    case at::kBFloat16: return Dtype::kBFloat16;
    case at::kHalf: return Dtype::kHalf;
    default: return std::nullopt;
  }
}

LayoutId to_layout(at::IntArrayRef layout) {
  if (layout == at::IntArrayRef{4, 2, 2}) return LayoutId::k422;
  if (layout == at::IntArrayRef{2, 2, 4}) return LayoutId::k224;
  if (layout == at::IntArrayRef{2, 1, 1, 2, 2}) return LayoutId::k21122;
  return LayoutId::kUnsupported;
}

Tensor linear_reference(const Tensor& x, at::TensorList planes, const Tensor& scales, const Tensor& width,
                        const std::optional<Tensor>& bias, at::IntArrayRef layout, int64_t group_size,
                        int64_t out_features, int64_t tile) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flexquant::linear_reference", "")
                             .typed<Tensor(const Tensor&, at::TensorList, const Tensor&, const Tensor&,
                                           const std::optional<Tensor>&, at::IntArrayRef, int64_t, int64_t, int64_t)>();
  return op.call(x, planes, scales, width, bias, layout, group_size, out_features, tile);
}

Tensor linear_cpu(const Tensor& x, at::TensorList planes, const Tensor& scales, const Tensor& width,
                  const std::optional<Tensor>& bias, at::IntArrayRef layout, int64_t group_size, int64_t out_features,
                  int64_t tile) {
  const std::optional<Dtype> dtype = to_dtype(x.scalar_type());
  const LayoutId layout_id = to_layout(layout);
  if (tile != kTile || layout_id == LayoutId::kUnsupported || !dtype) {
    return linear_reference(x, planes, scales, width, bias, layout, group_size, out_features, tile);
  }
  TORCH_CHECK_VALUE(x.dim() > 0, "x has no dimension: give [..., K]");
  LinearArgs a{};
  a.k = x.size(-1);
  a.n = out_features;
  a.group = group_size;
  const int64_t tiles = (a.n + kTile - 1) / kTile;
  TORCH_CHECK_VALUE(group_size == 32 || group_size == 64 || group_size == 128, "group_size ", group_size,
                    " is not supported: use 32, 64 or 128");
  TORCH_CHECK_VALUE(a.k > 0 && a.k % group_size == 0, "group_size ", group_size, " does not divide k = ", a.k,
                    ": choose one that does");
  TORCH_CHECK_VALUE(out_features >= 0, "out_features ", out_features, " is negative");
  TORCH_CHECK_VALUE(width.is_cpu() && width.scalar_type() == at::kInt && width.numel() == 1,
                    "width must be a CPU int32 tensor of one element, not ", width.scalar_type(), " with ",
                    width.numel(), " elements on ", width.device());

  const int wanted = *width.const_data_ptr<int32_t>();
  int bits = 0;
  for (const int64_t w : layout) {
    bits += static_cast<int>(w);
    ++a.planes_used;
    if (bits >= wanted) break;
  }
  if (bits != wanted) {
    clamped_calls.fetch_add(1, std::memory_order_relaxed);
    TORCH_WARN_ONCE("flexquant: width ", wanted, " is not in layout [", layout, "]; such layers run at the next width "
                    "the layout has, here ", bits, " (said once; the status of the server counts them)");
  }
  TORCH_CHECK_VALUE(static_cast<int64_t>(planes.size()) >= a.planes_used, "width ", bits, " needs ", a.planes_used,
                    " planes but ", planes.size(), " were given: load the missing planes or choose a lower width");
  for (int i = 0; i < a.planes_used; ++i) {
    const Tensor& plane = planes[i];
    TORCH_CHECK_VALUE(plane.is_cpu() && plane.scalar_type() == at::kByte && plane.is_contiguous() &&
                          plane.dim() == 2 && plane.size(0) == tiles && plane.size(1) == a.k * layout[i] * 2,
                      "plane ", i, " is ", plane.scalar_type(), " ", plane.sizes(), ": expected contiguous uint8 [",
                      tiles, ", ", a.k * layout[i] * 2, "] on cpu; tile it with tile_plane");
    a.planes[i] = plane.const_data_ptr<uint8_t>();
  }
  const int64_t groups = a.k / group_size;
  const int64_t sets = scales.dim() == 5 ? scales.size(0) : 0;
  TORCH_CHECK_VALUE(scales.is_cpu() && scales.scalar_type() == at::kHalf && scales.is_contiguous() &&
                        (sets == 1 || sets == static_cast<int64_t>(layout.size())) && scales.size(1) == tiles &&
                        scales.size(2) == groups && scales.size(3) == 2 && scales.size(4) == kTile,
                    "scales are ", scales.scalar_type(), " ", scales.sizes(), ": expected contiguous float16 [1 or ",
                    layout.size(), ", ", tiles, ", ", groups, ", 2, 16] on cpu; tile them with tile_scales");
  const int64_t set = sets == 1 ? 0 : a.planes_used - 1;
  a.scales = static_cast<const uint16_t*>(scales.const_data_ptr()) + set * tiles * groups * 2 * kTile;
  a.step = sets == 1 ? static_cast<float>(1 << (8 - bits)) : 1.0f;

  Tensor bias_kept;
  if (bias && bias->defined()) {
    TORCH_CHECK_VALUE(bias->is_cpu() && bias->dim() == 1 && bias->size(0) == a.n, "bias has shape ", bias->sizes(),
                      ": expected [", a.n, "] on cpu");
    bias_kept = to_dtype(bias->scalar_type()) ? bias->contiguous() : bias->to(at::kFloat).contiguous();
    a.bias = bias_kept.const_data_ptr();
    a.bias_dtype = *to_dtype(bias_kept.scalar_type());
  }

  const Tensor rows = x.contiguous();
  c10::SmallVector<int64_t, 4> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = a.n;
  Tensor out = at::empty(sizes, x.options());
  a.x = rows.const_data_ptr();
  a.out = out.mutable_data_ptr();
  a.dtype = *dtype;
  a.rows = x.numel() / a.k;
  a.layout = layout_id;
  a.max_threads = at::get_num_threads();
  linear(a);
  return out;
}

Tensor entropy_cpu(const Tensor& logits) {
  TORCH_CHECK_VALUE(logits.dim() == 2, "logits have shape ", logits.sizes(), ": give [rows, vocabulary]");
  const Tensor values = to_dtype(logits.scalar_type()) ? logits.contiguous() : logits.to(at::kFloat).contiguous();
  Tensor out = at::empty({logits.size(0)}, logits.options().dtype(at::kFloat));
  entropy({values.const_data_ptr(), out.mutable_data_ptr<float>(), *to_dtype(values.scalar_type()), values.size(0),
           values.size(1), at::get_num_threads()});
  return out;
}

}  // namespace
}  // namespace flexquant

// Calls of linear since the library was loaded whose width is not in their layout.
extern "C" __attribute__((visibility("default"))) long long flexquant_clamped_calls() {
  return flexquant::clamped_calls.load(std::memory_order_relaxed);
}

TORCH_LIBRARY_IMPL(flexquant, CPU, m) {
  if (flexquant::selected_isa() == flexquant::Isa::kNone) return;  // the reference keeps serving CPU tensors
  m.impl("linear", flexquant::linear_cpu);
  m.impl("entropy", flexquant::entropy_cpu);
}
