// y = x · Wᵀ + b for packed W. Every element is one chain of fused multiply-adds in the order of k, whatever the
// number of rows, threads or tiles: a row's result does not depend on the batch it came in.
//
// Packed W: panels of 32 columns, [panels][words][32] 32-bit words; a word is one float or two halves (k, k + 1).
// Packed x: tiles of up to kMaxRows rows, [k][rows], so that a step of k reads one short run.
#pragma once

#include "cpu_common.h"

namespace foretell {

constexpr int NR = 32;          // columns in a panel
constexpr int V = NR / W;       // vectors across a panel
// A tile is some rows × some vectors of a panel: its sums fill the registers, less what factors and weights need.
constexpr int kTileV = 2;
constexpr int kMaxRows = W == 16 ? 14 : 6;
constexpr i64 kBlockK = 768;    // k of one pass over a tile: a tile of x stays in L1
constexpr i64 kBlockRows = W == 16 ? 168 : 96;  // rows of one pass over a panel: they stay in L2
constexpr i64 kAhead = 64;                      // words by which prefetching runs ahead (8 KiB)
constexpr i64 kDotRows = 6;                     // from here on products, not memory, take the time
constexpr i64 kPackedFloats = i64(1) << 21;     // of x packed at a time (8 MiB)

struct LinearArgs {
  const float* x;  // [M, K], rows ldx apart
  i64 ldx, M, N, K;
  const uint32_t* w;
  const float* bias;  // [N] or null
  float* y;           // [M, N]
};

// One tile: MR rows × C vectors of columns over `words` words; columns beyond a panel's are the next panel's.
// `first`: start from zero, else go on from y; `bias` on the last.
template <class T, int MR, int C>
INLINE void tile(const float* x, const uint32_t* w, i64 panel_words, i64 words, float* y, i64 ldy, bool first,
                 const float* bias) {
  constexpr int P = C > V ? C / V : 1, N = C / P;  // panels, vectors of each
  vf acc[MR][C];
  UNROLL for (int m = 0; m < MR; m++) UNROLL for (int c = 0; c < C; c++)
    acc[m][c] = first ? vf{} : load(y + m * ldy + c * W);
  for (i64 k = 0; k < words; k++) {
    UNROLL for (int p = 0; p < P; p++) {
      const uint32_t* row = w + p * panel_words + k * NR;
      // The panel's first tile takes it from memory: ask for it well ahead.
      UNROLL for (int i = 0; i < N * W; i += 16) __builtin_prefetch(row + kAhead * NR + i);
      // A number of x is loaded once for all of the panel: this order needs the fewest registers.
      vu word[N];
      UNROLL for (int v = 0; v < N; v++) word[v] = load(row + v * W);
      UNROLL for (int h = 0; h < T::per_word; h++) {
        vf weight[N];
        UNROLL for (int v = 0; v < N; v++) weight[v] = h ? T::high(word[v]) : T::low(word[v]);
        UNROLL for (int m = 0; m < MR; m++) {
          vf factor = splat(x[h * MR + m]);
          UNROLL for (int v = 0; v < N; v++) acc[m][p * N + v] = multiply_add<T>(factor, weight[v], acc[m][p * N + v]);
        }
      }
    }
    x += MR * T::per_word;
  }
  UNROLL for (int m = 0; m < MR; m++) UNROLL for (int c = 0; c < C; c++)
    store(y + m * ldy + c * W, bias ? acc[m][c] + load(bias + c * W) : acc[m][c]);
}

// P panels, tile by tile.
template <class T, int MR, int P>
void tiles(const float* x, const uint32_t* w, i64 panel_words, i64 words, float* y, i64 ldy, bool first,
           const float* bias) {
  if constexpr (P > 1) return tile<T, MR, P * V>(x, w, panel_words, words, y, ldy, first, bias);
  for (int c = 0; c < NR; c += kTileV * W)
    tile<T, MR, kTileV>(x, w + c, panel_words, words, y + c, ldy, first, bias ? bias + c : nullptr);
}

template <class T>
using TileFn = void (*)(const float*, const uint32_t*, i64, i64, float*, i64, bool, const float*);

template <class T, int MR>
INLINE TileFn<T> pick(int rows) {
  if constexpr (MR == 1) return tiles<T, 1, 1>;
  else return rows == MR ? tiles<T, MR, 1> : pick<T, MR - 1>(rows);
}

// Columns [n, n + NR) of a tile, the last panel through a buffer where N ends inside it.
template <class T>
void edge_tile(TileFn<T> fn, int rows, int columns, const float* x, const uint32_t* w, i64 words, float* y,
               i64 ldy, bool first, const float* bias) {
  alignas(64) float buffer[kMaxRows * NR], wide_bias[NR] = {};
  for (int m = 0; m < rows && !first; m++) std::memcpy(buffer + m * NR, y + m * ldy, columns * sizeof(float));
  if (bias) std::memcpy(wide_bias, bias, columns * sizeof(float));
  fn(x, w, 0, words, buffer, NR, first, bias ? wide_bias : nullptr);
  for (int m = 0; m < rows; m++) std::memcpy(y + m * ldy, buffer + m * NR, columns * sizeof(float));
}

// Few rows, one tile high: stream the panels, several side by side to hide the latency of the chains.
template <class T, int MR, int P>
void stream(const LinearArgs& a, const float* x, i64 words, i64 begin, i64 end) {
  i64 panel = begin, whole = a.N / NR;
  for (; panel + P <= end && panel + P <= whole; panel += P)
    tiles<T, MR, P>(x, a.w + panel * words * NR, words * NR, words, a.y + panel * NR, a.N, true,
                   a.bias ? a.bias + panel * NR : nullptr);
  for (; panel < end; panel++) {
    const uint32_t* w = a.w + panel * words * NR;
    const float* bias = a.bias ? a.bias + panel * NR : nullptr;
    if (panel < whole) tiles<T, MR, 1>(x, w, 0, words, a.y + panel * NR, a.N, true, bias);
    else edge_tile<T>(tiles<T, MR, 1>, MR, int(a.N - panel * NR), x, w, words, a.y + panel * NR, a.N, true, bias);
  }
}

// Rows are dealt to tiles evenly: 16 rows are 8 + 8, not 14 + 2.
struct Tiling {
  i64 rows, tiles;
  explicit Tiling(i64 m) : rows(m), tiles((m + kMaxRows - 1) / kMaxRows) {}
  i64 start(i64 t) const { return t * (rows / tiles) + (t < rows % tiles ? t : rows % tiles); }
  int height(i64 t) const { return int(rows / tiles + (t < rows % tiles)); }
};

INLINE void pack_rows(const float* x, i64 ldx, int rows, i64 K, i64 padded_k, float* out) {
  for (i64 k0 = 0; k0 < K; k0 += 16) {
    i64 k1 = k0 + 16 < K ? k0 + 16 : K;
    for (int m = 0; m < rows; m++)
      for (i64 k = k0; k < k1; k++) out[k * rows + m] = x[m * ldx + k];
  }
  for (i64 i = K * rows; i < padded_k * rows; i++) out[i] = 0;
}

// The same with two rounded numbers in the place of one.
INLINE void pack_rounded_rows(const float* x, i64 ldx, int rows, i64 K, float* out) {
  for (int m = 0; m < rows; m++)
    for (i64 k = 0; k < K; k += 2) {
      uint32_t high = k + 1 < K ? float_to_bf16(x[m * ldx + k + 1]) : 0;
      uint32_t word = float_to_bf16(x[m * ldx + k]) | high << 16;
      std::memcpy(out + k / 2 * rows + m, &word, sizeof word);
    }
}

// Tiles [t0, t1) × panels [p0, p1), k in passes: a panel's pass is read once for all the tiles.
template <class T>
void block(const LinearArgs& a, const Tiling& tiling, const float* packed, i64 words, i64 t0, i64 t1, i64 p0,
           i64 p1) {
  constexpr i64 step = kBlockK / T::per_word;
  i64 padded_k = words * T::per_word;
  for (i64 k = 0; k < words; k += step) {
    i64 count = words - k < step ? words - k : step;
    for (i64 p = p0; p < p1; p++) {
      const uint32_t* w = a.w + (p * words + k) * NR;
      const float* bias = a.bias && k + count == words ? a.bias + p * NR : nullptr;
      int columns = int(a.N - p * NR < NR ? a.N - p * NR : NR);
      for (i64 t = t0; t < t1; t++) {
        int rows = tiling.height(t);
        const float* x = packed + tiling.start(t) * padded_k + k * T::per_word * rows;
        float* y = a.y + tiling.start(t) * a.N + p * NR;
        TileFn<T> fn = pick<T, kMaxRows>(rows);
        if (columns == NR) fn(x, w, 0, count, y, a.N, k == 0, bias);
        else edge_tile<T>(fn, rows, columns, x, w, count, y, a.N, k == 0, bias);
      }
    }
  }
}

template <class T>
constexpr i64 kNumbersPerWord = i64(4 / sizeof(typename T::T));

// Packs x, then deals out runs of tiles × runs of panels: run(tiling, packed, t0, t1, p0, p1).
template <class T, class Run>
void multiply_rows(const LinearArgs& a, Run run) {
  static thread_local Scratch scratch;
  i64 words = (a.K + kNumbersPerWord<T> - 1) / kNumbersPerWord<T>, panels = (a.N + NR - 1) / NR;
  i64 padded_k = words * T::per_word;
  float* packed = scratch.get(size_t(a.M * padded_k));
  Tiling tiling(a.M);
  i64 per_block = kBlockRows / kMaxRows;
  int threads = team(a.M * a.N * a.K, 1 << 15);
  i64 row_blocks = (tiling.tiles + per_block - 1) / per_block;
  i64 group = panels * row_blocks / (threads * 6);  // panels in a task: six tasks a thread even out the load
  group = group < 1 ? 1 : group > 16 ? 16 : group;
  i64 groups = (panels + group - 1) / group;
  parallel_runs(tiling.tiles, threads, [&](i64 begin, i64 end) {
    for (i64 t = begin; t < end; t++) {
      const float* x = a.x + tiling.start(t) * a.ldx;
      float* to = packed + tiling.start(t) * padded_k;
      if (T::per_word == kNumbersPerWord<T>) pack_rows(x, a.ldx, tiling.height(t), a.K, padded_k, to);
      else pack_rounded_rows(x, a.ldx, tiling.height(t), a.K, to);
    }
  });
  parallel(groups * row_blocks, threads, [&](i64 task) {
    i64 t0 = task / groups * per_block, p0 = task % groups * group;
    run(tiling, packed, t0, t0 + per_block < tiling.tiles ? t0 + per_block : tiling.tiles, p0,
        p0 + group < panels ? p0 + group : panels);
  });
}

// As many rows at a time as may be packed: f(arguments of a part).
template <class F>
INLINE void split_rows(const LinearArgs& a, F f) {
  i64 rows = kPackedFloats / a.K / kBlockRows * kBlockRows;
  if (rows < kBlockRows) rows = kBlockRows;
  for (i64 m = 0; m < a.M; m += rows) {
    LinearArgs part = a;
    part.x += m * a.ldx, part.y += m * a.N, part.M = a.M - m < rows ? a.M - m : rows;
    f(part);
  }
}

template <class T>
void multiply(LinearArgs a) {
  i64 words = (a.K + kNumbersPerWord<T> - 1) / kNumbersPerWord<T>, panels = (a.N + NR - 1) / NR;
  if (a.M == 1 && a.K == words * T::per_word) {
    int threads = team(panels * words, 1 << 10);
    parallel_runs((panels + 1) / 2, threads, [&](i64 begin, i64 end) {  // panels go in pairs
      stream<T, 1, W == 4 ? 1 : 2>(a, a.x, words, 2 * begin, 2 * end < panels ? 2 * end : panels);
    });
    return;
  }
  split_rows(a, [words](const LinearArgs& part) {
    multiply_rows<T>(part, [&](const Tiling& tiling, const float* packed, i64 t0, i64 t1, i64 p0, i64 p1) {
      block<T>(part, tiling, packed, words, t0, t1, p0, p1);
    });
  });
}

// w: [N][row_bytes] plain; halves of an odd K are padded with zero.
template <class T>
void pack_weight(const char* w, i64 N, i64 K, i64 row_bytes, uint32_t* out) {
  constexpr i64 size = sizeof(typename T::T);
  want_huge_pages(out, size_t((N + NR - 1) / NR * NR * ((K + kNumbersPerWord<T> - 1) / kNumbersPerWord<T>)) * 4);
  i64 words = (K + kNumbersPerWord<T> - 1) / kNumbersPerWord<T>, panels = (N + NR - 1) / NR;
  parallel(panels, team(N * K, 1 << 16), [&](i64 p) {
    for (i64 k = 0; k < words; k++)
      for (i64 c = 0; c < NR; c++) {
        uint32_t word = 0;
        i64 n = p * NR + c, left = (K - k * kNumbersPerWord<T>) * size;
        if (n < N) std::memcpy(&word, w + n * row_bytes + k * 4, left < 4 ? left : 4);
        out[(p * words + k) * NR + c] = word;
      }
  });
}

}  // namespace foretell
