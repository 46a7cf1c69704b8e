// First and second derivatives of a fragment of scores, for row and column passes alike (docs/math.md).
#pragma once

#include "cuda/aside.h"

namespace metattn::cuda {

template <class T>
static METATTN_DEVICE T probability(T s, T reference, T log_total) {
  return exponential((s - reference) - log_total);
}

template <class T, int Tiles>
static METATTN_DEVICE void apply_dropout(const Params& p, const DropoutBits<Tiles>& kept, Fragment<T, Tiles>& x) {
  x.each([&](T& value, int, int, int slot, int t, int e) {
    value = kept.at(slot, t, e) ? value * static_cast<T>(p.dropout_keep_scale) : 0;
  });
}

// T = s1∘TR + β − ω·distance, of one entry; raw is the sum of products, without scale.
template <bool Full, bool Turned, class T>
static METATTN_DEVICE T score_tangent(const Window<Turned>& window, T score, T raw, T bend, int r, int c) {
  const Params& p = window.p;
  T tangent = raw * static_cast<T>(p.scale);
  if constexpr (Full) {
    if (p.softcap != 0) tangent *= 1 - bend * bend;
    // where nothing is attended, what stands in the bias' tangent is nobody's business
    if (p.t_bias && score != -kInfinity<T>) tangent += bias_tangent<Turned, T>(window, r, c);
    if (p.t_slopes)
      tangent -= per_head<T>(p.t_slopes, window.place) *
                 static_cast<T>(alibi_distance(window.place.s, window.query(r, c), window.key(r, c)));
  }
  return tangent;
}

// A fragment of scores and what is made of it.
template <class T, int Tiles>
struct Scores {
  Fragment<T, Tiles> s, bend, dp, e, tr;
  Fragment<T, Tiles> outer, inner;  // dR, or dRt and dR: weights of q and k, and of their tangents
  Fragment<T, Tiles> weights;       // P∘Z, or Pt∘Z: weights of dO
  Fragment<T, Tiles> ds;            // dS, or dSt
};

template <bool Full, bool Turned, class S, class T, int Tiles>
static METATTN_DEVICE void scores_of(Scores<T, Tiles>& at, const Window<Turned>& window, SharedTile<S> rows, int first_row,
                                     SharedTile<S> columns, int depth) {
  at.s.fill(0);
  at.dp.fill(0);
  at.e.fill(0);
  at.tr.fill(0);
  add_scores(at.s, rows, first_row, columns, depth);
  finish_scores<Full>(window, at.s, at.bend);
}

// dO Vᵀ and, Second, dO Cᵀ, or turned; the side of dO as rows in a row pass. Tiles that are absent leave zeros.
template <bool Second, class S, class T, int Tiles>
static METATTN_DEVICE void cotangents_of(Scores<T, Tiles>& at, SharedTile<S> d_o, int first_row, SharedTile<S> v,
                                         SharedTile<S> c, int depth) {
  add_scores(at.dp, d_o, first_row, v, depth);
  if constexpr (Second) add_scores(at.e, d_o, first_row, c, depth);
}

// First order: dS = P∘(dP − D), dR = s1∘dS. Second: with Pt = P∘(T − τ), dSt = Pt∘(dP − D) + P∘(E − Dt),
// dRt = s1∘dSt + s2∘TR∘dS.
template <bool Full, bool Second, bool Turned, class T, int Tiles>
static METATTN_DEVICE void differentiate(Scores<T, Tiles>& at, const Window<Turned>& window, const Statistics<T>& known,
                                         int first_row) {
  const Params& p = window.p;
  const bool drops = Full && p.rng != nullptr;
  const DropoutBits<Tiles> kept = dropout<Full, Turned, Tiles>(window);
  const T keep_scale = static_cast<T>(p.dropout_keep_scale);
  at.s.each([&](T& value, int r, int c, int slot, int t, int e) {
    const int row = Turned ? c : first_row + r;
    const T score = value;
    const T weight = probability(score, known.reference[row], known.log_total[row]);
    const T z = !drops ? T{1} : (kept.at(slot, t, e) ? keep_scale : T{0});
    const bool shown = score != -kInfinity<T>;
    const T gain = at.dp.x[slot][t][e] * z - known.d[row];
    const T ds = shown ? weight * gain : 0;
    T slope = 1, bend = 0;
    if (Full && p.softcap != 0) {
      bend = at.bend.x[slot][t][e];
      slope = 1 - bend * bend;
    }
    if constexpr (Second) {
      const T raw = at.tr.x[slot][t][e];
      const T tangent = score_tangent<Full>(window, score, raw, bend, r, c);
      const T weight_t = shown ? weight * (tangent - known.tau[row]) : 0;
      const T dst = shown ? weight_t * gain + weight * (at.e.x[slot][t][e] * z - known.dt[row]) : 0;
      T outer = slope * dst;
      if (Full && p.softcap != 0 && shown)
        outer += bend * slope * static_cast<T>(-2 / p.softcap) * raw * static_cast<T>(p.scale) * ds;
      at.outer.x[slot][t][e] = outer;
      at.inner.x[slot][t][e] = slope * ds;
      at.weights.x[slot][t][e] = weight_t * z;
      at.ds.x[slot][t][e] = dst;
    } else {
      at.outer.x[slot][t][e] = slope * ds;
      at.weights.x[slot][t][e] = weight * z;
      at.ds.x[slot][t][e] = ds;
    }
  });
}

}  // namespace metattn::cuda
