// SPDX-License-Identifier: Apache-2.0
// Policy `budget` for one worker, decided in place. What the functions compute is what vllm_flexquant/policy/budget.py
// says, in fp64 and in its words; NumPy would take some forty operations for it in every step.
#pragma once

#include <cstdint>

namespace flexquant {

constexpr int64_t kClasses = 64;
constexpr int64_t kOther = -1;  // class of rows that count for none

enum class Aggregate : int64_t { kMean, kQuantile, kMax };

// One of vllm_flexquant/policy/decision.py, as int32 [2].
struct Decision {
  int32_t level, held;
};

// fp64 [kClasses] each.
struct Ledger {
  double asked[kClasses], price[kClasses], balance[kClasses], spent[kClasses], tokens[kClasses], needed[kClasses],
      foreseen[kClasses];
};

// Mirrored by `State` of budget.py: eight bytes a field. Pointers stay valid as long as the state is used.
struct BudgetState {
  // what calibration found, [levels] where nothing else is said
  int64_t levels;
  const double *kl, *cost, *early_kl, *late_kl, *late_cost;
  const double* width_kl;  // [9]
  int64_t entropy_bins, average_bins;
  const double *by_entropy, *by_average;  // [entropy_bins], [average_bins]
  double bin_nats;
  // the policy
  double horizon, least_move, quantile;
  int64_t dwell;
  Aggregate aggregate;
  int64_t by_average_before;  // whether the averages before the step say what it needs
  // the probe: score = exp(x . weight + bias)
  const float* weight;  // [hidden], null where there is none
  int64_t hidden, probe_layer;
  double bias;
  // the sequences, by slot
  const float* average;
  const bool* seen;
  // what changes from step to step
  Ledger* ledger;
  Decision* decisions;  // [3]: first, later, last one by the probe
  int64_t* row_class;   // [tokens]
  double* scores;       // [tokens]
  double* price;        // [1]
  int64_t* bounds;      // [2]
  int32_t* ceiling;     // [1]
  // the precision table
  int64_t layers;
  const int32_t* rungs;    // [levels, layers]
  const int32_t* allowed;  // [layers, 9], null where layers have every width
  int32_t* written;        // [layers]
};

// The sequences of a step: int64 [4, count], their slots, rows of the forward pass, classes, and places in the batch.
struct Sequences {
  const int64_t* facts;
  int64_t count;

  const int64_t* slots() const { return facts; }
  const int64_t* rows() const { return facts + count; }
  const int64_t* classes() const { return facts + 2 * count; }
  const int64_t* places() const { return facts + 3 * count; }
};

}  // namespace flexquant
