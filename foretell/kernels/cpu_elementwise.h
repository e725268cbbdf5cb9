// Norms, activations, rotary embedding and the KV store: memory-bound loops over rows.
#pragma once

#include "cpu_common.h"

namespace foretell {

constexpr i64 kElementsPerThread = 1 << 14;

INLINE vf load_part(const float* p, i64 n) {  // n < W floats, zero beyond
  float lane[W] = {};
  std::memcpy(lane, p, n * sizeof(float));
  return load(lane);
}
INLINE void store_part(float* p, vf v, i64 n) {
  float lane[W];
  store(lane, v);
  std::memcpy(p, lane, n * sizeof(float));
}

// f(vector of x, index) for all of a row, the last part padded with zero.
template <class F>
INLINE void each(const float* x, i64 n, F f) {
  i64 i = 0;
  for (; i + W <= n; i += W) f(load(x + i), i, i64(W));
  if (i < n) f(load_part(x + i, n - i), i, n - i);
}
INLINE void put(float* p, vf v, i64 n) { n == W ? store(p, v) : store_part(p, v, n); }
INLINE vf take(const float* p, i64 n) { return n == W ? load(p) : load_part(p, n); }

INLINE void rms_norm_row(const float* x, const float* w, i64 C, float eps, float* y) {
  vf squares{};
  each(x, C, [&](vf v, i64, i64) { squares = fma(v, v, squares); });
  vf scale = splat(1.f / std::sqrt(sum(squares) / float(C) + eps));
  each(x, C, [&](vf v, i64 i, i64 n) { put(y + i, v * scale * take(w + i, n), n); });
}

INLINE void layer_norm_row(const float* x, const float* w, const float* b, i64 C, float eps, float* y) {
  vf total{}, squares{};
  each(x, C, [&](vf v, i64, i64) { total += v; });
  vf mean = splat(sum(total) / float(C));
  each(x, C, [&](vf v, i64, i64 n) {
    vf d = v - mean;
    if (n < W) d = load_part((const float*)&d, n);  // the padding is no deviation
    squares = fma(d, d, squares);
  });
  vf scale = splat(1.f / std::sqrt(sum(squares) / float(C) + eps));
  each(x, C, [&](vf v, i64 i, i64 n) {
    vf d = (v - mean) * scale * take(w + i, n);
    put(y + i, b ? d + take(b + i, n) : d, n);
  });
}

INLINE vf exp(vf x) {  // e^x = 2^(x · log2 e); the product's rounding error is carried along
  vf high = x * splat(1.44269504f);
  vf low = fma(x, splat(1.44269504f), -high) + x * splat(1.92596303e-8f);
  high = vmin(high, splat(127.f));
  vf y = exp2(high);
  return x < splat(-86.f) ? vf{} : fma(y, low * splat(0.69314718f), y);
}
INLINE vf sigmoid(vf x) { return splat(1.f) / (splat(1.f) + exp(-x)); }

// The normal distribution function Φ(x), by Φ(-z√2) = e^(-z²) · t · q(t) / 2 with t = 1/(1 + z/2): q is a polynomial
// fitted to relative error 5e-8.
INLINE vf normal_cdf(vf x) {
  vf z = vmax(x, -x) * splat(0.70710678f);
  vf t = splat(1.f) / fma(z, splat(0.5f), splat(1.f));
  vf q = splat(-5.884634378e-02f);
  q = fma(q, t, splat(2.834842873e-01f));
  q = fma(q, t, splat(-4.849306980e-01f));
  q = fma(q, t, splat(2.754566959e-01f));
  q = fma(q, t, splat(-2.481575852e-02f));
  q = fma(q, t, splat(2.019152977e-01f));
  q = fma(q, t, splat(2.433005004e-01f));
  q = fma(q, t, splat(2.823479818e-01f));
  q = fma(q, t, splat(2.820879953e-01f));
  vf tail = splat(0.5f) * exp(-z * z) * t * q;
  return x > vf{} ? splat(1.f) - tail : tail;
}

enum Act { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3 };

template <int A>
INLINE vf act(vf x) {
  if (A == kSilu) return x * sigmoid(x);
  if (A == kGelu) return x * normal_cdf(x);
  if (A == kGeluTanh) {  // (1 + tanh u)/2 = sigmoid(2u)
    vf u = splat(1.5957691f) * fma(x * x * x, splat(0.044715f), x);
    return x * sigmoid(u);
  }
  return x > vf{} ? x : (x == x ? vf{} : x);
}

// y = act(x) · up, or act(x) where up is null.
template <int A>
INLINE void act_row(const float* x, const float* up, i64 n, float* y) {
  each(x, n, [&](vf v, i64 i, i64 c) { put(y + i, up ? act<A>(v) * take(up + i, c) : act<A>(v), c); });
}

// Rotates the first 2R of a head: (a, b) → (a·cos - b·sin, b·cos + a·sin).
INLINE void rope_head(float* x, const float* cos, const float* sin, i64 R) {
  each(cos, R, [&](vf c, i64 i, i64 n) {
    vf s = take(sin + i, n), a = take(x + i, n), b = take(x + R + i, n);
    put(x + i, a * c - b * s, n);
    put(x + R + i, b * c + a * s, n);
  });
}

template <class T>
INLINE void narrow_row(const float* x, i64 n, typename T::T* y) {
  for (i64 i = 0; i < n; i++) y[i] = T::narrow(x[i]);
}

}  // namespace foretell
