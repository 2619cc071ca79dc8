// SPDX-License-Identifier: Apache-2.0
// Written by `python -m flexquant_kernels.state`; the layout stands in state.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace flexquant {

constexpr int64_t kAccounts = 128;
enum class Aggregate : int64_t { kMean, kQuantile, kMax };

struct State {
  int64_t levels;
  int64_t layers;
  int64_t slots;
  int64_t rows;
  int64_t entropy_bins;
  int64_t average_bins;
  int64_t hidden;
  int64_t table;
  int64_t average_at;
  int64_t seen_at;
  int64_t row_account_at;
  int64_t scores_at;
  int64_t kl_at;
  int64_t cost_at;
  int64_t early_kl_at;
  int64_t late_kl_at;
  int64_t early_cost_at;
  int64_t late_cost_at;
  int64_t need_by_entropy_at;
  int64_t need_by_average_at;
  int64_t weight_at;
  int64_t rungs_at;
  int64_t allowed_at;
  double horizon[1];  // tokens whose budget fills a bucket
  double least_move[1];  // levels that a change must exceed, a fp32 value
  double quantile[1];  // which one, under that aggregate
  double entropy_low[1];  // nats, policy entropy: the cheapest level up to here
  double entropy_high[1];  // nats, policy entropy: the best level from here
  double falling[1];  // tokens, policy progressive: over which the level falls
  int64_t full[1];  // tokens, policy progressive: at the best level
  int64_t lowest[1];  // level, policy progressive: where it ends
  int64_t pinned[1];  // level of policies static and manual
  int64_t dwell[1];  // steps between two changes at least
  int64_t aggregate[1];  // index into AGGREGATES
  int64_t by_average[1];  // 1: averages of entropy say what a token needs before the step
  int64_t bounds[2];  // lowest and highest width in bits
  int64_t ceiling[1];  // best level that may be decided
  int64_t probes[1];  // 1: the probe decides the layers after it
  int64_t probe_layer[1];  // index of the first layer that the probe decides
  double price[1];  // of a nat, in the cost of the best level; -1 without any row
  int32_t decisions[6];  // level and held of: first layers, later layers, last probe
  double asked[128];  // nats per token, 0 where none is asked
  double base_price[128];  // at which the average text costs what is asked
  double balance[128];  // nats left over, owed if below 0
  double spent[128];  // nats booked since the start
  double tokens[128];  // tokens booked since the start
  double needed[128];  // fading sum of what was needed, seen after the step
  double foreseen[128];  // fading sum of what was needed, seen before it
  int64_t unknown[1];  // rows so far whose logits were no distribution
  double width_kl[9];  // nats per token with all layers at so many bits
  double bin_nats[1];  // width of a bin of entropy
  double bias[1];  // of the probe

  // [slots] nats, moving average of the entropies
  float* average() { return at<float>(average_at); }
  const float* average() const { return at<float>(average_at); }
  // [slots] whether there is one
  bool* seen() { return at<bool>(seen_at); }
  const bool* seen() const { return at<bool>(seen_at); }
  // [rows] account, -1 for rows that count for none
  int64_t* row_account() { return at<int64_t>(row_account_at); }
  const int64_t* row_account() const { return at<int64_t>(row_account_at); }
  // [rows] what the row needs, over the average token
  double* scores() { return at<double>(scores_at); }
  const double* scores() const { return at<double>(scores_at); }
  // [levels] nats per token, cheapest level first
  double* kl() { return at<double>(kl_at); }
  const double* kl() const { return at<double>(kl_at); }
  // [levels] over that of the best level
  double* cost() { return at<double>(cost_at); }
  const double* cost() const { return at<double>(cost_at); }
  // [levels] the part of layers before the probe
  double* early_kl() { return at<double>(early_kl_at); }
  const double* early_kl() const { return at<double>(early_kl_at); }
  // [levels] the rest
  double* late_kl() { return at<double>(late_kl_at); }
  const double* late_kl() const { return at<double>(late_kl_at); }
  // [levels] the part of layers before the probe
  double* early_cost() { return at<double>(early_cost_at); }
  const double* early_cost() const { return at<double>(early_cost_at); }
  // [levels] the rest
  double* late_cost() { return at<double>(late_cost_at); }
  const double* late_cost() const { return at<double>(late_cost_at); }
  // [entropy_bins] need of tokens whose own entropy is there
  double* need_by_entropy() { return at<double>(need_by_entropy_at); }
  const double* need_by_entropy() const { return at<double>(need_by_entropy_at); }
  // [average_bins] need of tokens whose average is there
  double* need_by_average() { return at<double>(need_by_average_at); }
  const double* need_by_average() const { return at<double>(need_by_average_at); }
  // [hidden] of the probe: score = exp(x . weight + bias)
  float* weight() { return at<float>(weight_at); }
  const float* weight() const { return at<float>(weight_at); }
  // [levels][layers] width of each layer at each level, bits
  int32_t* rungs() { return at<int32_t>(rungs_at); }
  const int32_t* rungs() const { return at<int32_t>(rungs_at); }
  // [layers][9] width a layer runs at when so many bits are wanted
  int32_t* allowed() { return at<int32_t>(allowed_at); }
  const int32_t* allowed() const { return at<int32_t>(allowed_at); }
  int32_t* widths() const { return reinterpret_cast<int32_t*>(table); }

 private:
  template <typename T>
  T* at(int64_t offset) const {
    auto* start = reinterpret_cast<char*>(const_cast<State*>(this));
    return reinterpret_cast<T*>(start + offset);
  }
};

static_assert(sizeof(State) == 7616);
static_assert(offsetof(State, levels) == 0);
static_assert(offsetof(State, layers) == 8);
static_assert(offsetof(State, slots) == 16);
static_assert(offsetof(State, rows) == 24);
static_assert(offsetof(State, entropy_bins) == 32);
static_assert(offsetof(State, average_bins) == 40);
static_assert(offsetof(State, hidden) == 48);
static_assert(offsetof(State, table) == 56);
static_assert(offsetof(State, average_at) == 64);
static_assert(offsetof(State, seen_at) == 72);
static_assert(offsetof(State, row_account_at) == 80);
static_assert(offsetof(State, scores_at) == 88);
static_assert(offsetof(State, kl_at) == 96);
static_assert(offsetof(State, cost_at) == 104);
static_assert(offsetof(State, early_kl_at) == 112);
static_assert(offsetof(State, late_kl_at) == 120);
static_assert(offsetof(State, early_cost_at) == 128);
static_assert(offsetof(State, late_cost_at) == 136);
static_assert(offsetof(State, need_by_entropy_at) == 144);
static_assert(offsetof(State, need_by_average_at) == 152);
static_assert(offsetof(State, weight_at) == 160);
static_assert(offsetof(State, rungs_at) == 168);
static_assert(offsetof(State, allowed_at) == 176);
static_assert(offsetof(State, horizon) == 184);
static_assert(offsetof(State, least_move) == 192);
static_assert(offsetof(State, quantile) == 200);
static_assert(offsetof(State, entropy_low) == 208);
static_assert(offsetof(State, entropy_high) == 216);
static_assert(offsetof(State, falling) == 224);
static_assert(offsetof(State, full) == 232);
static_assert(offsetof(State, lowest) == 240);
static_assert(offsetof(State, pinned) == 248);
static_assert(offsetof(State, dwell) == 256);
static_assert(offsetof(State, aggregate) == 264);
static_assert(offsetof(State, by_average) == 272);
static_assert(offsetof(State, bounds) == 280);
static_assert(offsetof(State, ceiling) == 296);
static_assert(offsetof(State, probes) == 304);
static_assert(offsetof(State, probe_layer) == 312);
static_assert(offsetof(State, price) == 320);
static_assert(offsetof(State, decisions) == 328);
static_assert(offsetof(State, asked) == 352);
static_assert(offsetof(State, base_price) == 1376);
static_assert(offsetof(State, balance) == 2400);
static_assert(offsetof(State, spent) == 3424);
static_assert(offsetof(State, tokens) == 4448);
static_assert(offsetof(State, needed) == 5472);
static_assert(offsetof(State, foreseen) == 6496);
static_assert(offsetof(State, unknown) == 7520);
static_assert(offsetof(State, width_kl) == 7528);
static_assert(offsetof(State, bin_nats) == 7600);
static_assert(offsetof(State, bias) == 7608);

}  // namespace flexquant
