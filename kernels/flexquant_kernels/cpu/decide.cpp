// SPDX-License-Identifier: Apache-2.0
// Policy `budget` for one worker, decided in place on the state: one call for each moment of a step. It computes what
// vllm_flexquant/policy/budget.py says, in fp64 and in its words; NumPy would take some forty operations a step for it.
// No index of a caller leads outside of the state or of what was handed in.
#include <omp.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <new>
#include <span>
#include <vector>

#include "kernels.h"
#include "state.h"

namespace flexquant {
namespace {

// as in vllm_flexquant/policy/budget.py
constexpr double kForeseenTokens = 128.0, kMostCorrection = 8.0, kMostNeed = 1e4, kMostBooked = 100.0, kAim = 0.95,
                 kOctaves = 2.0;
constexpr int32_t kMostHeld = 1 << 30;
constexpr int64_t kNone = -1;  // account of rows that count for none
constexpr int64_t kWidths = 9;

// The sequences of a step: int64 [4, count], their slots, rows of the forward pass, accounts, and places in the batch.
struct Facts {
  const int64_t* values;
  int64_t count;

  int64_t slot(int64_t i) const { return values[i]; }
  int64_t row(int64_t i) const { return values[count + i]; }
  int64_t account(int64_t i) const { return values[2 * count + i]; }
  int64_t place(int64_t i) const { return values[3 * count + i]; }
};

// By place in the batch, nats.
struct Entropies {
  const float* nats;
  int64_t count;
};

// One of vllm_flexquant/policy/decision.py; the state has three.
struct Decision {
  int32_t level, held;
};
static_assert(sizeof(State::decisions) == 3 * sizeof(Decision));

enum { kFirst, kLater, kLast };

Decision& decision(State& s, int64_t which) { return reinterpret_cast<Decision*>(s.decisions)[which]; }

bool within(int64_t index, int64_t count) { return 0 <= index && index < count; }

// Of a sequence; one whose slot, row or account is not there counts for none. rows: of what is read by row.
int64_t account_of(const State& s, const Facts& f, int64_t i, int64_t rows) {
  const bool known = within(f.slot(i), s.slots) && within(f.row(i), rows) && within(f.row(i), s.rows);
  return known && within(f.account(i), kAccounts) ? f.account(i) : kNone;
}

// Accounts that occur in a step: its work goes by its rows, not by the accounts that there are.
class Accounts {
 public:
  // True the first time.
  bool add(int64_t account) {
    uint64_t& word = words_[account / 64];
    const uint64_t before = word;
    word |= uint64_t{1} << account % 64;
    return word != before;
  }

  // In ascending order.
  template <typename F>
  void each(F visit) const {
    for (int64_t i = 0; i < kAccounts / 64; ++i) {
      for (uint64_t word = words_[i]; word != 0; word &= word - 1) visit(64 * i + std::countr_zero(word));
    }
  }

 private:
  static_assert(kAccounts % 64 == 0);
  uint64_t words_[kAccounts / 64] = {};
};

// 1 where there is no table.
double need_of(const double* table, int64_t bins, double bin_nats, float nats) {
  if (bins == 0) return 1.0;
  if (!std::isfinite(nats)) return std::numeric_limits<double>::infinity();
  const double bin = static_cast<double>(nats) / bin_nats;
  return table[bin > 0 ? static_cast<int64_t>(std::min(bin, static_cast<double>(bins - 1))) : 0];
}

double correction(const State& s, int64_t k) {
  return std::clamp(s.needed[k] / s.foreseen[k], 1.0, kMostCorrection);
}

// NaN where what is known of the account is not finite.
double in_force(const State& s, int64_t k) {
  if (!std::isfinite(s.asked[k]) || !std::isfinite(s.balance[k])) return std::numeric_limits<double>::quiet_NaN();
  const double share = s.balance[k] / std::max(s.asked[k] * *s.horizon, 1e-12);
  return s.base_price[k] * std::exp2(-kOctaves * std::clamp(share, -1.0, 1.0));
}

// What the rows of an account, at least one, demand together.
double demand(const State& s, std::span<double> needs) {
  const auto aggregate = static_cast<Aggregate>(*s.aggregate);
  if (aggregate == Aggregate::kMax) return *std::max_element(needs.begin(), needs.end());
  if (aggregate == Aggregate::kQuantile) {
    const float last = static_cast<float>(needs.size() - 1);
    const float rank = std::nearbyint(last * static_cast<float>(*s.quantile));
    const auto wanted = needs.begin() + static_cast<int64_t>(rank > 0 ? std::min(rank, last) : 0.0f);
    std::nth_element(needs.begin(), wanted, needs.end());
    return *wanted;
  }
  double sum = 0.0;
  for (const double need : needs) sum += need;
  return sum / static_cast<double>(needs.size());
}

// Of the rows' scores, the dearest account's; -1 without any row. An account whose price is no number has no say.
double price(const State& s, const Facts& f, int64_t rows) {
  thread_local std::vector<double> needs;
  Accounts met;
  int64_t ends[kAccounts], total = 0;  // of an account's part of `needs`, where it was met
  for (int64_t i = 0; i < f.count; ++i) {
    const int64_t k = account_of(s, f, i, rows);
    if (k == kNone) continue;
    if (met.add(k)) ends[k] = 0;
    ++ends[k];
  }
  met.each([&](int64_t k) {
    const int64_t count = ends[k];
    ends[k] = total;
    total += count;
  });
  needs.resize(total);
  for (int64_t i = 0; i < f.count; ++i) {
    const int64_t k = account_of(s, f, i, rows);
    if (k == kNone) continue;
    const double need = s.scores()[f.row(i)];
    needs[ends[k]++] = std::isnan(need) ? kMostNeed : std::clamp(need, 0.0, kMostNeed);
  }
  double dearest = -1.0;
  int64_t begin = 0;
  met.each([&](int64_t k) {
    const std::span<double> own(needs.data() + begin, ends[k] - begin);
    const double found = in_force(s, k) * demand(s, own) * correction(s, k);
    if (std::isfinite(found)) dearest = std::max(dearest, found);
    begin = ends[k];
  });
  return dearest;
}

Decision cheapest(const State& s, const double* cost, const double* kl, double price, const Decision& last) {
  const int64_t top = s.levels - 1, ceiling = std::clamp<int64_t>(*s.ceiling, 0, top);
  int64_t wanted = 0;
  double least = std::numeric_limits<double>::infinity();
  for (int64_t level = 0; level <= ceiling; ++level) {
    const double objective = cost[level] + price * kl[level];
    if (objective < least) {
      least = objective;
      wanted = level;
    }
  }
  const int32_t held = std::min(last.held, kMostHeld - 1) + 1;
  bool moves = static_cast<double>(std::abs(wanted - last.level)) > *s.least_move;
  moves |= wanted != last.level && (wanted == 0 || wanted == top);
  moves = moves && held >= *s.dwell && price >= 0;
  const int64_t level = moves ? wanted : last.level;
  return {static_cast<int32_t>(std::min(level, ceiling)), moves ? 0 : held};
}

int64_t level_of(const State& s, int64_t which) {
  return std::clamp<int64_t>(s.decisions[2 * which], 0, s.levels - 1);
}

int32_t bound(const State& s, int64_t which) {
  return static_cast<int32_t>(std::clamp<int64_t>(s.bounds[which], 0, kWidths - 1));
}

// Of the level of layers after the probe.
void write_widths(const State& s, int64_t first) {
  const int32_t low = bound(s, 0), high = bound(s, 1);
  const int32_t* rung = s.rungs() + level_of(s, kLater) * s.layers;
  const int32_t* allowed = s.allowed();
  int32_t* widths = s.widths();
  for (int64_t layer = std::max<int64_t>(first, 0); layer < s.layers; ++layer) {
    widths[layer] = allowed[layer * kWidths + std::min(std::max(rung[layer], low), high)];
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
void score_rows(State& s, const Facts& f, const T* x, int64_t rows, int64_t stride) {
  for (int64_t i = 0; i < f.count; ++i) {
    if (account_of(s, f, i, rows) == kNone) continue;
    const int64_t row = f.row(i);
    s.scores()[row] = std::exp(dot(x + row * stride, s.weight(), s.hidden) + static_cast<float>(*s.bias));
  }
}

void decide(State& s, const Facts& f, int64_t rows) {
  const double dearest = price(s, f, rows);
  if (dearest < 0) return;
  *s.price = dearest;
  decision(s, kLast) = cheapest(s, s.late_cost(), s.late_kl(), dearest, decision(s, kLast));
  decision(s, kLater) = decision(s, kLast);
  write_widths(s, *s.probe_layer);
}

}  // namespace
}  // namespace flexquant

#define FQ_EXPORT extern "C" __attribute__((visibility("default")))

using namespace flexquant;

FQ_EXPORT int64_t flexquant_state_bytes() { return sizeof(State); }

// `bounds` and `ceiling` are set; `before` are the sequences of the step before.
FQ_EXPORT void flexquant_begin(State* s, const Facts* now, const Facts* before) {
  for (int64_t i = 0; i < before->count; ++i) {
    if (within(before->row(i), s->rows)) s->row_account()[before->row(i)] = kNone;
  }
  for (int64_t i = 0; i < now->count; ++i) {
    const int64_t k = account_of(*s, *now, i, s->rows);
    if (k == kNone) continue;
    const int64_t row = now->row(i), slot = now->slot(i);
    s->row_account()[row] = k;
    const bool knows = *s->by_average && s->seen()[slot];
    s->scores()[row] =
        knows ? need_of(s->need_by_average(), s->average_bins, *s->bin_nats, s->average()[slot]) : 1.0;
  }
  *s->price = price(*s, *now, s->rows);
  decision(*s, kFirst) = cheapest(*s, s->cost(), s->kl(), *s->price, decision(*s, kFirst));
  decision(*s, kLater) = decision(*s, kFirst);
  write_widths(*s, 0);
}

// x: [rows, hidden] of `dtype`, `stride` elements from row to row.
FQ_EXPORT void flexquant_probe(State* s, const Facts* now, const void* x, int64_t dtype, int64_t rows, int64_t stride) {
  if (*s->probes == 0) return;
  switch (static_cast<Dtype>(dtype)) {
    case Dtype::kFloat: score_rows(*s, *now, static_cast<const float*>(x), rows, stride); break;
    case Dtype::kBFloat16: score_rows(*s, *now, static_cast<const BFloat16*>(x), rows, stride); break;
    case Dtype::kHalf: score_rows(*s, *now, static_cast<const Half*>(x), rows, stride); break;
  }
  decide(*s, *now, rows);
}

// The same with scores that are known, fp32 [rows].
FQ_EXPORT void flexquant_decide(State* s, const Facts* now, const float* scores, int64_t rows) {
  if (*s->probes == 0) return;
  for (int64_t i = 0; i < now->count; ++i) {
    if (account_of(*s, *now, i, rows) != kNone) s->scores()[now->row(i)] = scores[now->row(i)];
  }
  decide(*s, *now, rows);
}

// The widths of layers from `first_layer` on anew, of what is decided and in the bounds that are set.
FQ_EXPORT void flexquant_write(State* s, int64_t first_layer) { write_widths(*s, first_layer); }

FQ_EXPORT void flexquant_book(State* s, const Facts* now, const Entropies* entropies) {
  struct Sums {
    double rows, needed, expected;
  };
  Accounts met;
  Sums sums[kAccounts];  // where an account was met
  for (int64_t i = 0; i < now->count; ++i) {
    const int64_t k = account_of(*s, *now, i, s->rows), place = now->place(i);
    if (k == kNone || !within(place, entropies->count)) continue;
    const double found = need_of(s->need_by_entropy(), s->entropy_bins, *s->bin_nats, entropies->nats[place]);
    const double score = s->scores()[now->row(i)];
    if (met.add(k)) sums[k] = {};
    sums[k].rows += 1.0;
    sums[k].needed += std::isfinite(found) ? found : 1.0;
    sums[k].expected += std::isfinite(score) ? std::clamp(score, 0.0, kMostBooked) : score < 0 ? 0.0 : 1.0;
  }
  const double at_levels = s->early_kl()[level_of(*s, kFirst)] + s->late_kl()[level_of(*s, kLater)];
  const double kl = std::min(std::max(at_levels, s->width_kl[bound(*s, 1)]), s->width_kl[bound(*s, 0)]);
  met.each([&](int64_t k) {
    const auto [rows, needed, expected] = sums[k];
    const double spent = kl * expected * correction(*s, k);
    const double full = s->asked[k] * *s->horizon;
    const double balance = s->balance[k] + kAim * s->asked[k] * rows - spent;
    const double fade = std::exp(-rows / kForeseenTokens);
    s->balance[k] = std::max(std::min(balance, full), -full);
    s->spent[k] += spent;
    s->tokens[k] += rows;
    s->needed[k] = s->needed[k] * fade + needed;
    s->foreseen[k] = s->foreseen[k] * fade + expected;
  });
}

// Entropies of the rows of logits, nats, and into the averages of their slots; planner/sequences.py says how.
// slots: [rows]. False where scratch memory cannot be had.
FQ_EXPORT bool flexquant_read_logits(State* s, const void* logits, int64_t dtype, int64_t rows, int64_t vocab,
                                     double decay, const int64_t* slots, float* nats) {
  try {
    entropy({logits, nats, static_cast<Dtype>(dtype), rows, vocab, omp_get_max_threads()});
  } catch (const std::bad_alloc&) {
    return false;
  }
  for (int64_t i = 0; i < rows; ++i) {
    *s->unknown += !std::isfinite(nats[i]);
    if (!within(slots[i], s->slots)) continue;
    float& average = s->average()[slots[i]];
    bool& seen = s->seen()[slots[i]];
    const float mixed = nats[i] + static_cast<float>(decay) * (average - nats[i]);
    average = seen && std::isfinite(mixed) ? mixed : nats[i];
    seen = true;
  }
  return true;
}
