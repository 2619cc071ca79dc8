// SPDX-License-Identifier: Apache-2.0
#include "budget.h"

#include <omp.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <new>
#include <vector>

#include "kernels.h"

namespace flexquant {
namespace {

// as in vllm_flexquant/policy/budget.py
constexpr double kForeseenTokens = 128.0, kMostCorrection = 8.0, kMostNeed = 1e4, kMostBooked = 100.0, kAim = 0.95,
                 kOctaves = 2.0;

enum { kFirst, kLater, kLast };

double need_of(const double* table, int64_t bins, double bin_nats, float nats) {
  if (!std::isfinite(nats)) return std::numeric_limits<double>::infinity();
  const double bin = static_cast<double>(nats) / bin_nats;
  return table[static_cast<int64_t>(std::clamp(bin, 0.0, static_cast<double>(bins - 1)))];
}

double correction(const Ledger& ledger, int64_t k) {
  return std::clamp(ledger.needed[k] / ledger.foreseen[k], 1.0, kMostCorrection);
}

double in_force(const BudgetState& s, int64_t k) {
  const Ledger& ledger = *s.ledger;
  const double share = ledger.balance[k] / std::max(ledger.asked[k] * s.horizon, 1e-12);
  return ledger.price[k] * std::exp2(-kOctaves * std::clamp(share, -1.0, 1.0));
}

// What the rows of a class demand together.
double demand(const BudgetState& s, std::vector<double>& needs) {
  if (s.aggregate == Aggregate::kMax) return *std::max_element(needs.begin(), needs.end());
  if (s.aggregate == Aggregate::kQuantile) {
    const float rank = std::nearbyint(static_cast<float>(needs.size() - 1) * static_cast<float>(s.quantile));
    const auto wanted = needs.begin() + static_cast<int64_t>(rank);
    std::nth_element(needs.begin(), wanted, needs.end());
    return *wanted;
  }
  double sum = 0.0;
  for (const double need : needs) sum += need;
  return sum / static_cast<double>(needs.size());
}

// Of the rows' scores; -1 without any row.
double price(const BudgetState& s, const Sequences& q) {
  thread_local std::vector<double> needs;
  double dearest = -1.0;
  for (int64_t k = 0; k < kClasses; ++k) {
    needs.clear();
    for (int64_t i = 0; i < q.count; ++i) {
      if (q.classes()[i] != k) continue;
      const double need = s.scores[q.rows()[i]];
      needs.push_back(std::isnan(need) ? kMostNeed : std::clamp(need, 0.0, kMostNeed));
    }
    if (!needs.empty()) dearest = std::max(dearest, in_force(s, k) * demand(s, needs) * correction(*s.ledger, k));
  }
  return dearest;
}

Decision cheapest(const BudgetState& s, const double* cost, const double* kl, double price, const Decision& last) {
  int32_t wanted = 0;
  double least = std::numeric_limits<double>::infinity();
  const int64_t ceiling = *s.ceiling;
  for (int64_t level = 0; level <= ceiling; ++level) {
    const double objective = cost[level] + price * kl[level];
    if (objective < least) {
      least = objective;
      wanted = static_cast<int32_t>(level);
    }
  }
  const int32_t top = static_cast<int32_t>(s.levels) - 1;
  bool moves = std::abs(wanted - last.level) > s.least_move;
  moves |= wanted != last.level && (wanted == 0 || wanted == top);
  moves = moves && last.held + 1 >= s.dwell && price >= 0;
  const int32_t level = moves ? wanted : last.level;
  return {std::min(level, static_cast<int32_t>(ceiling)), moves ? 0 : last.held + 1};
}

void write_widths(const BudgetState& s, int32_t level, int64_t first) {
  const int32_t low = static_cast<int32_t>(s.bounds[0]), high = static_cast<int32_t>(s.bounds[1]);
  const int32_t* rung = s.rungs + level * s.layers;
  for (int64_t layer = first; layer < s.layers; ++layer) {
    const int32_t width = std::min(std::max(rung[layer], low), high);
    s.written[layer] = s.allowed ? s.allowed[layer * 9 + width] : width;
  }
}

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

float to_float(float value) { return value; }
float to_float(BFloat16 value) { return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }

// Not every compiler has a type for it.
float to_float(Half value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16, rest = (value.bits & 0x7fffu) << 13;
  const bool finite = rest < (31u << 23);
  const float scaled = std::bit_cast<float>(rest) * 0x1p112f;  // from a bias of 127 to one of 15
  const uint32_t magnitude = finite ? std::bit_cast<uint32_t>(scaled) : rest | 0x7f800000u;
  return std::bit_cast<float>(magnitude | sign);
}

// With sums side by side, so that compilers vectorize it without being told to reorder.
template <typename T>
float dot(const T* x, const float* weight, int64_t count) {
  constexpr int64_t kSums = 16;
  float sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums) {
    for (int64_t j = 0; j < kSums; ++j) sums[j] += to_float(x[i + j]) * weight[i + j];
  }
  for (; i < count; ++i) sums[i % kSums] += to_float(x[i]) * weight[i];
  float sum = 0.0f;
  for (const float part : sums) sum += part;
  return sum;
}

template <typename T>
void score_rows(const BudgetState& s, const Sequences& q, const T* x, int64_t stride) {
  for (int64_t i = 0; i < q.count; ++i) {
    const int64_t row = q.rows()[i];
    s.scores[row] = std::exp(dot(x + row * stride, s.weight, s.hidden) + static_cast<float>(s.bias));
  }
}

void decide(BudgetState& s, const Sequences& q) {
  const double dearest = price(s, q);
  if (dearest < 0) return;
  *s.price = dearest;
  s.decisions[kLast] = cheapest(s, s.late_cost, s.late_kl, dearest, s.decisions[kLast]);
  s.decisions[kLater] = s.decisions[kLast];
  write_widths(s, s.decisions[kLater].level, s.probe_layer);
}

}  // namespace
}  // namespace flexquant

#define FQ_EXPORT extern "C" __attribute__((visibility("default")))

using flexquant::BudgetState;
using flexquant::Dtype;
using flexquant::Sequences;

FQ_EXPORT int64_t flexquant_budget_state_bytes() { return sizeof(BudgetState); }

// `bounds` and `ceiling` are set; `before` are the rows of the step before.
FQ_EXPORT void flexquant_budget_begin(BudgetState* s, const Sequences* q, const Sequences* before) {
  for (int64_t i = 0; i < before->count; ++i) s->row_class[before->rows()[i]] = flexquant::kOther;
  for (int64_t i = 0; i < q->count; ++i) {
    const int64_t row = q->rows()[i], slot = q->slots()[i];
    s->row_class[row] = q->classes()[i];
    const bool knows = s->by_average_before && s->seen[slot];
    s->scores[row] =
        knows ? flexquant::need_of(s->by_average, s->average_bins, s->bin_nats, s->average[slot]) : 1.0;
  }
  *s->price = flexquant::price(*s, *q);
  flexquant::Decision* decisions = s->decisions;
  decisions[flexquant::kFirst] = flexquant::cheapest(*s, s->cost, s->kl, *s->price, decisions[flexquant::kFirst]);
  decisions[flexquant::kLater] = decisions[flexquant::kFirst];
  flexquant::write_widths(*s, decisions[flexquant::kFirst].level, 0);
}

// x: [rows, hidden] of `dtype`, `stride` elements from row to row.
FQ_EXPORT void flexquant_budget_probe(BudgetState* s, const Sequences* q, const void* x, int64_t dtype,
                                      int64_t stride) {
  switch (static_cast<Dtype>(dtype)) {
    case Dtype::kFloat: flexquant::score_rows(*s, *q, static_cast<const float*>(x), stride); break;
    case Dtype::kBFloat16: flexquant::score_rows(*s, *q, static_cast<const flexquant::BFloat16*>(x), stride); break;
    case Dtype::kHalf: flexquant::score_rows(*s, *q, static_cast<const flexquant::Half*>(x), stride); break;
  }
  flexquant::decide(*s, *q);
}

// The same with scores that are known, fp32 by row.
FQ_EXPORT void flexquant_budget_decide(BudgetState* s, const Sequences* q, const float* scores) {
  for (int64_t i = 0; i < q->count; ++i) s->scores[q->rows()[i]] = scores[q->rows()[i]];
  flexquant::decide(*s, *q);
}

// entropy: fp32 by place in the batch, nats.
FQ_EXPORT void flexquant_budget_book(BudgetState* s, const Sequences* q, const float* entropy) {
  flexquant::Ledger& ledger = *s->ledger;
  const int32_t first = s->decisions[flexquant::kFirst].level, later = s->decisions[flexquant::kLater].level;
  double kl = s->early_kl[first] + s->late_kl[later];
  kl = std::min(std::max(kl, s->width_kl[s->bounds[1]]), s->width_kl[s->bounds[0]]);
  double rows[flexquant::kClasses] = {}, expected[flexquant::kClasses] = {}, needed[flexquant::kClasses] = {};
  for (int64_t i = 0; i < q->count; ++i) {
    const int64_t k = s->row_class[q->rows()[i]];
    if (k < 0) continue;
    const double found = flexquant::need_of(s->by_entropy, s->entropy_bins, s->bin_nats, entropy[q->places()[i]]);
    const double score = s->scores[q->rows()[i]];
    rows[k] += 1.0;
    needed[k] += std::isfinite(found) ? found : 1.0;
    expected[k] += std::isfinite(score) ? std::clamp(score, 0.0, flexquant::kMostBooked) : score < 0 ? 0.0 : 1.0;
  }
  for (int64_t k = 0; k < flexquant::kClasses; ++k) {
    if (rows[k] == 0.0) continue;
    const double spent = kl * expected[k] * flexquant::correction(ledger, k);
    const double full = ledger.asked[k] * s->horizon;
    const double balance = ledger.balance[k] + flexquant::kAim * ledger.asked[k] * rows[k] - spent;
    const double fade = std::exp(-rows[k] / flexquant::kForeseenTokens);
    ledger.balance[k] = std::max(std::min(balance, full), -full);
    ledger.spent[k] += spent;
    ledger.tokens[k] += rows[k];
    ledger.needed[k] = ledger.needed[k] * fade + needed[k];
    ledger.foreseen[k] = ledger.foreseen[k] * fade + expected[k];
  }
}

// Entropies of the rows of logits, nats, and into the averages of their slots; runtime/sequences.py says how.
// False where scratch memory cannot be had.
FQ_EXPORT bool flexquant_read_logits(const void* logits, int64_t dtype, int64_t rows, int64_t vocab, double decay,
                                     const int64_t* slots, float* nats, float* average, bool* seen,
                                     int64_t* unknown) {
  try {
    flexquant::entropy({logits, nats, static_cast<Dtype>(dtype), rows, vocab, omp_get_max_threads()});
  } catch (const std::bad_alloc&) {
    return false;
  }
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t slot = slots[i];
    const float mixed = nats[i] + static_cast<float>(decay) * (average[slot] - nats[i]);
    average[slot] = seen[slot] && std::isfinite(mixed) ? mixed : nats[i];
    seen[slot] = true;
    *unknown += !std::isfinite(nats[i]);
  }
  return true;
}
