// y = x · Wᵀ + b for weights kept as a GGUF file ships them: small integers q with a scale d and, in some types,
// a minimum m for every 16 or 32 of them. Nothing is quantised anew and activations stay float32.
//
// A weight is d·q + m, rounded once. That is its float32 value bit by bit as gguf dequantises it: d has 11 bits
// (17 in K types, with the scale's scale), q at most 8, so that d·q fits in float32 wherever an m follows.
// And the sum is the float32 kernel's, one chain in the order of k. So a result is the same bits as that
// kernel's on the dequantised weight, whatever the number of rows, threads or tiles.
//
// Packed: [panels of 32 columns][groups of k] of d[32], m[32] if any, then q, eight steps of k after the other.
#pragma once

#include "cpu_linear.h"

namespace foretell {

constexpr int kFusedRows = W == 16 ? 8 : 6;  // up to here weights go from memory to registers, beyond to scratch
constexpr int kWideRows = W == 16 ? 8 : 1;   // up to here the sums of a whole panel fit in registers, too
constexpr i64 kAheadBytes = 4096;            // by which prefetching runs ahead

// --- integers: eight steps of k for a panel, the value of step j in vector v of the columns ---

template <bool kSigned>
struct Nibbles {  // [32] words, nibble j of a word is step j
  static constexpr i64 bytes = 4 * NR;
  vu word[V];
  INLINE explicit Nibbles(const uint8_t* p) {  // vector by vector: one copy would go by way of the stack
    UNROLL for (int v = 0; v < V; v++) std::memcpy(&word[v], p + v * sizeof(vu), sizeof(vu));
  }
  INLINE vf operator()(int j, int v) const {
#if defined(FORETELL_AVX512)
    // A table look-up uses the lowest four bits of its index and ignores the others: it masks and converts.
    const __m512 table = kSigned ? _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1)
                                 : _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return (vf)_mm512_permutexvar_ps((__m512i)(word[v] >> (4 * j)), table);
#else
    if (kSigned) return __builtin_convertvector((vi)(word[v] << (28 - 4 * j)) >> 28, vf);
    return __builtin_convertvector((vi)((word[v] >> (4 * j)) & 15u), vf);
#endif
  }
  static INLINE void put(uint8_t* p, int c, const int8_t* q) {
    uint32_t w = 0;
    for (int j = 0; j < 8; j++) w |= uint32_t(q[j] & 15) << (4 * j);
    std::memcpy(p + 4 * c, &w, 4);
  }
};

struct Bytes {  // [8][32] signed bytes
  static constexpr i64 bytes = 8 * NR;
  typedef int8_t vb __attribute__((vector_size(W)));
  const uint8_t* p;
  INLINE explicit Bytes(const uint8_t* at) : p(at) {}
  INLINE vf operator()(int j, int v) const {
#if defined(FORETELL_AVX512)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(p + j * NR + v * W))));
#elif defined(FORETELL_AVX2)
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + j * NR + v * W))));
#else
    vb b;
    std::memcpy(&b, p + j * NR + v * W, sizeof b);
    return __builtin_convertvector(b, vf);
#endif
  }
  static INLINE void put(uint8_t* p, int c, const int8_t* q) {
    for (int j = 0; j < 8; j++) p[j * NR + c] = uint8_t(q[j]);
  }
};

// --- a packed layout: integers, the format of scales, whether there are minima, weights to a scale ---

template <class Q, class S, bool kMin, int kGroup>
struct Layout {
  typedef Q Ints;
  typedef typename S::T E;
  static constexpr int group = kGroup;
  static constexpr i64 header = i64(sizeof(E)) * NR * (kMin ? 2 : 1), bytes = header + kGroup / 8 * Q::bytes;
  static INLINE void scales(const uint8_t* p, vf* d, vf* m) {
    const E* e = reinterpret_cast<const E*>(p);
    UNROLL for (int v = 0; v < V; v++) d[v] = S::load_run(e + v * W);
    UNROLL for (int v = 0; v < V; v++) m[v] = kMin ? S::load_run(e + NR + v * W) : vf{};
  }
  static INLINE vf weight(vf q, vf d, vf m) { return kMin ? fma(d, q, m) : d * q; }
  static INLINE void put(uint8_t* p, int c, float d, float m, const int8_t* q) {
    E* e = reinterpret_cast<E*>(p);
    e[c] = S::narrow(d);
    if (kMin) e[NR + c] = S::narrow(m);
    for (int k = 0; k < kGroup; k += 8) Q::put(p + header + k / 8 * Q::bytes, c, q + k);
  }
};

// --- the GGUF types: group i of a block → q, d, m (ggml-common.h of ggml describes the blocks) ---

INLINE float half_at(const uint8_t* p) {
  uint16_t h;
  std::memcpy(&h, p, 2);
  return f16_to_float(h);
}
INLINE void nibbles_at(const uint8_t* p, int8_t* q) {
  for (int i = 0; i < 16; i++) q[i] = int8_t(p[i] & 15), q[i + 16] = int8_t(p[i] >> 4);
}
INLINE void fifth_bits_at(const uint8_t* p, int8_t* q) {
  for (int i = 0; i < 32; i++) q[i] = int8_t(q[i] | (p[i / 8] >> (i % 8) & 1) << 4);
}
INLINE void shift(int8_t* q, int n, int by) {
  for (int i = 0; i < n; i++) q[i] = int8_t(q[i] - by);
}

struct Q4_0 : Layout<Nibbles<true>, F16, false, 32> {
  static constexpr i64 block_weights = 32, block_bytes = 18;
  static INLINE void get(const uint8_t* p, int, int8_t* q, float* d, float*) {
    nibbles_at(p + 2, q), shift(q, 32, 8), *d = half_at(p);
  }
};
struct Q4_1 : Layout<Nibbles<false>, F16, true, 32> {
  static constexpr i64 block_weights = 32, block_bytes = 20;
  static INLINE void get(const uint8_t* p, int, int8_t* q, float* d, float* m) {
    nibbles_at(p + 4, q), *d = half_at(p), *m = half_at(p + 2);
  }
};
struct Q8_0 : Layout<Bytes, F16, false, 32> {
  static constexpr i64 block_weights = 32, block_bytes = 34;
  static INLINE void get(const uint8_t* p, int, int8_t* q, float* d, float*) {
    std::memcpy(q, p + 2, 32), *d = half_at(p);
  }
};
struct Q5_0 : Layout<Bytes, F16, false, 32> {  // the fifth bit apart would cost more than it saves
  static constexpr i64 block_weights = 32, block_bytes = 22;
  static INLINE void get(const uint8_t* p, int, int8_t* q, float* d, float*) {
    nibbles_at(p + 6, q), fifth_bits_at(p + 2, q), shift(q, 32, 16), *d = half_at(p);
  }
};
struct Q5_1 : Layout<Bytes, F16, true, 32> {
  static constexpr i64 block_weights = 32, block_bytes = 24;
  static INLINE void get(const uint8_t* p, int, int8_t* q, float* d, float* m) {
    nibbles_at(p + 8, q), fifth_bits_at(p + 4, q), *d = half_at(p), *m = half_at(p + 2);
  }
};
struct Q4_K : Layout<Nibbles<false>, F32, true, 32> {
  static constexpr i64 block_weights = 256, block_bytes = 144;
  static INLINE void get(const uint8_t* p, int i, int8_t* q, float* d, float* m) {
    const uint8_t *s = p + 4, *low = p + 16 + i / 2 * 32;
    int scale = i < 4 ? s[i] & 63 : (s[i + 4] & 15) | (s[i - 4] >> 6) << 4;
    int minimum = i < 4 ? s[i + 4] & 63 : s[i + 4] >> 4 | (s[i] >> 6) << 4;
    for (int j = 0; j < 32; j++) q[j] = int8_t(i % 2 ? low[j] >> 4 : low[j] & 15);
    *d = half_at(p) * float(scale), *m = -(half_at(p + 2) * float(minimum));
  }
};
struct Q6_K : Layout<Bytes, F32, false, 16> {
  static constexpr i64 block_weights = 256, block_bytes = 210;
  static INLINE void get(const uint8_t* p, int i, int8_t* q, float* d, float*) {
    int half = i / 8, quarter = i % 8 / 2, from = i % 2 * 16;  // two halves of four runs of 32
    const uint8_t *low = p + half * 64 + quarter % 2 * 32 + from, *high = p + 128 + half * 32 + from;
    for (int j = 0; j < 16; j++)
      q[j] = int8_t((quarter < 2 ? low[j] & 15 : low[j] >> 4) | (high[j] >> (2 * quarter) & 3) << 4);
    shift(q, 16, 32), *d = float(int8_t(p[192 + i])) * half_at(p + 208);
  }
};

template <class F>
bool with_quant(int type, F f) {
  switch (type) {
    case 0: return f(Q4_0{}), true;
    case 1: return f(Q4_1{}), true;
    case 2: return f(Q5_0{}), true;
    case 3: return f(Q5_1{}), true;
    case 4: return f(Q8_0{}), true;
    case 5: return f(Q4_K{}), true;
    case 6: return f(Q6_K{}), true;
  }
  return false;
}

template <class F>
i64 quant_bytes(i64 N, i64 K) {
  return (N + NR - 1) / NR * (K / F::group) * F::bytes;
}

// raw: [N][row_bytes] of blocks. Columns beyond N are zeros.
template <class F>
void pack_quant(const uint8_t* raw, i64 N, i64 K, i64 row_bytes, uint8_t* out) {
  constexpr int per_block = int(F::block_weights / F::group);
  want_huge_pages(out, size_t(quant_bytes<F>(N, K)));
  i64 panels = (N + NR - 1) / NR, groups = K / F::group;
  parallel(panels, team(N * K, 1 << 16), [&](i64 p) {
    for (i64 g = 0; g < groups; g++)
      for (int c = 0; c < NR; c++) {
        int8_t q[F::group] = {};
        float d = 0, m = 0;
        const uint8_t* row = raw + (p * NR + c) * row_bytes;
        if (p * NR + c < N) F::get(row + g / per_block * F::block_bytes, int(g % per_block), q, &d, &m);
        F::put(out + (p * groups + g) * F::bytes, c, d, m, q);
      }
  });
}

// --- products ---

struct QuantArgs {
  LinearArgs linear;  // its w is not used
  const uint8_t* w;
};

// MR rows × vectors [from, from + N) of P panels over all of k; x as [k][MR].
template <class F, int MR, int P, int from, int N>
INLINE void fused_tile(const float* x, const uint8_t* w, i64 panel_bytes, i64 groups, float* y, i64 ldy,
                       const float* bias) {
  vf acc[MR][P * N] = {};
  for (i64 g = 0; g < groups; g++, w += F::bytes) {
    vf d[P * N], m[P * N];
    UNROLL for (int p = 0; p < P; p++) {
      vf all_d[V], all_m[V];
      F::scales(w + p * panel_bytes, all_d, all_m);
      UNROLL for (int v = 0; v < N; v++) d[p * N + v] = all_d[from + v], m[p * N + v] = all_m[from + v];
      if (from == 0)
        UNROLL for (i64 i = 0; i < F::bytes; i += 64) __builtin_prefetch(w + p * panel_bytes + kAheadBytes + i);
    }
    for (i64 s = 0; s < F::group / 8; s++, x += 8 * MR) {
      UNROLL for (int p = 0; p < P; p++) {
        typename F::Ints q(w + p * panel_bytes + F::header + s * F::Ints::bytes);
        UNROLL for (int j = 0; j < 8; j++) {
          vf weight[N];
          UNROLL for (int v = 0; v < N; v++) weight[v] = F::weight(q(j, from + v), d[p * N + v], m[p * N + v]);
          UNROLL for (int r = 0; r < MR; r++) {
            vf factor = splat(x[j * MR + r]);
            UNROLL for (int v = 0; v < N; v++) acc[r][p * N + v] = fma(factor, weight[v], acc[r][p * N + v]);
          }
        }
      }
    }
  }
  UNROLL for (int r = 0; r < MR; r++) UNROLL for (int p = 0; p < P; p++) UNROLL for (int v = 0; v < N; v++) {
    int c = p * NR + (from + v) * W;
    store(y + r * ldy + c, bias ? acc[r][p * N + v] + load(bias + c) : acc[r][p * N + v]);
  }
}

// P whole panels, in halves where the sums of all columns would not fit: the second finds its weights in L1.
template <class F, int MR, int P>
void fused_tiles(const float* x, const uint8_t* w, i64 panel_bytes, i64 groups, float* y, i64 ldy, const float* bias) {
  if constexpr (MR <= kWideRows) return fused_tile<F, MR, P, 0, V>(x, w, panel_bytes, groups, y, ldy, bias);
  fused_tile<F, MR, P, 0, V / 2>(x, w, panel_bytes, groups, y, ldy, bias);
  fused_tile<F, MR, P, V / 2, V / 2>(x, w, panel_bytes, groups, y, ldy, bias);
}

template <class F, int MR>
void fused_panels(const QuantArgs& a, const float* x, i64 begin, i64 end) {
  constexpr int P = MR <= 2 && W == 16 ? 2 : 1;
  const LinearArgs& l = a.linear;
  i64 panel = begin, whole = l.N / NR, groups = l.K / F::group, bytes = groups * F::bytes;
  for (; panel + P <= end && panel + P <= whole; panel += P)
    fused_tiles<F, MR, P>(x, a.w + panel * bytes, bytes, groups, l.y + panel * NR, l.N,
                         l.bias ? l.bias + panel * NR : nullptr);
  for (; panel < end; panel++) {
    alignas(64) float buffer[MR * NR], bias[NR] = {};
    i64 columns = l.N - panel * NR < NR ? l.N - panel * NR : NR;
    if (l.bias) std::memcpy(bias, l.bias + panel * NR, columns * sizeof(float));
    fused_tiles<F, MR, 1>(x, a.w + panel * bytes, 0, groups, buffer, NR, l.bias ? bias : nullptr);
    for (int r = 0; r < MR; r++) std::memcpy(l.y + r * l.N + panel * NR, buffer + r * NR, columns * sizeof(float));
  }
}

template <class F, int MR>
void multiply_fused(const QuantArgs& a) {
  if constexpr (MR > 0) {
    const LinearArgs& l = a.linear;
    if (l.M != MR) return multiply_fused<F, MR - 1>(a);
    static thread_local Scratch scratch;
    const float* x = l.x;
    if (MR > 1) {
      float* packed = scratch.get(size_t(MR * l.K));
      pack_rows(l.x, l.ldx, MR, l.K, l.K, packed);
      x = packed;
    }
    i64 panels = (l.N + NR - 1) / NR;
    parallel_runs((panels + 1) / 2, team(panels * l.K * MR, 1 << 11), [&](i64 begin, i64 end) {  // panels go in pairs
      fused_panels<F, MR>(a, x, 2 * begin, 2 * end < panels ? 2 * end : panels);
    });
  }
}

template <class F>
void unpack(const uint8_t* w, i64 groups, float* out) {
  for (i64 g = 0; g < groups; g++, w += F::bytes) {
    vf d[V], m[V];
    F::scales(w, d, m);
    UNROLL for (i64 i = 0; i < F::bytes; i += 64) __builtin_prefetch(w + kAheadBytes + i);
    for (i64 s = 0; s < F::group / 8; s++) {
      typename F::Ints q(w + F::header + s * F::Ints::bytes);
      UNROLL for (int j = 0; j < 8; j++, out += NR) UNROLL for (int v = 0; v < V; v++)
        store(out + v * W, F::weight(q(j, v), d[v], m[v]));
    }
  }
}

// Tiles [t0, t1) × panels [p0, p1): a panel's pass is unpacked once, to float32 in L2, for all the tiles.
template <class F>
void unpacked_block(const LinearArgs& a, const uint8_t* w, const Tiling& tiling, const float* packed, i64 t0, i64 t1,
                    i64 p0, i64 p1) {
  static thread_local Scratch scratch;
  float* weights = scratch.get(size_t(kBlockK * NR));
  for (i64 k = 0; k < a.K; k += kBlockK) {
    i64 count = a.K - k < kBlockK ? a.K - k : kBlockK;
    for (i64 p = p0; p < p1; p++) {
      unpack<F>(w + (p * a.K + k) / F::group * F::bytes, count / F::group, weights);
      const float* bias = a.bias && k + count == a.K ? a.bias + p * NR : nullptr;
      int columns = int(a.N - p * NR < NR ? a.N - p * NR : NR);
      for (i64 t = t0; t < t1; t++) {
        int rows = tiling.height(t);
        const float* x = packed + tiling.start(t) * a.K + k * rows;
        float* y = a.y + tiling.start(t) * a.N + p * NR;
        const uint32_t* words = reinterpret_cast<const uint32_t*>(weights);
        TileFn<F32> fn = pick<F32, kMaxRows>(rows);
        if (columns == NR) fn(x, words, 0, count, y, a.N, k == 0, bias);
        else edge_tile<F32>(fn, rows, columns, x, words, count, y, a.N, k == 0, bias);
      }
    }
  }
}

template <class F>
void multiply_quant(const QuantArgs& a) {
  if (a.linear.M <= kFusedRows) return multiply_fused<F, kFusedRows>(a);
  split_rows(a.linear, [&](const LinearArgs& part) {
    multiply_rows<F32>(part, [&](const Tiling& tiling, const float* packed, i64 t0, i64 t1, i64 p0, i64 p1) {
      unpacked_block<F>(part, a.w, tiling, packed, t0, t1, p0, p1);
    });
  });
}

}  // namespace foretell
