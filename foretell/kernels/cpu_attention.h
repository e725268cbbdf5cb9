// Causal attention over the paged cache.
//
// History is cut into splits of kSplit positions, aligned to position 0. Within a split the softmax is computed
// whole; the splits' partial results are then merged in order. Scores sum over d in order, values over positions
// in order, and a masked position adds an exact zero. So a token's result is the same bits whether it came alone
// or in a chunk of a thousand, and whether its splits ran in one thread or in many.
//
// Work is done in units: some query tokens of one sequence × the query heads of one KV head, so that each row of
// K and V is read once for all of them. K is transposed and V widened into scratch, 64 positions at a time.
#pragma once

#include <utility>
#include <vector>

#include "cpu_common.h"

namespace foretell {

constexpr i64 kSplit = 256;    // positions whose softmax is computed at once
constexpr i64 kTile = 64;      // positions of K or V in scratch at once
constexpr i64 kUnitRows = 48;  // query rows (tokens × heads) that share a pass over K and V
constexpr i64 kMaxPartialFloats = i64(1) << 23;

struct AttentionArgs {
  const float* q;  // [M, H, D]
  i64 q_token_stride, q_head_stride;
  const void *k, *v;  // [blocks, G, block_size, D]
  const int32_t* tables;  // [S, table_stride]
  i64 table_stride;
  const int32_t *query_starts, *kv_lens;
  i64 S, H, G, D, block_size, window;  // window 0: none
  float scale;
  float* out;  // [M, H, D]
  i64 group() const { return H / G; }
  i64 padded_d() const { return (D + W - 1) / W * W; }
};

struct Unit {
  i64 s, g, t0, t1, position;  // tokens t0..t1 of the batch, the first at `position` of sequence s
  i64 rows(const AttentionArgs& a) const { return (t1 - t0) * a.group(); }
  i64 end() const { return position + t1 - t0; }  // keys [begin, end) are visible to some row
  i64 begin(const AttentionArgs& a) const { return a.window && position >= a.window ? position - a.window + 1 : 0; }
  i64 first_split(const AttentionArgs& a) const { return begin(a) / kSplit; }
  i64 last_split() const { return (end() + kSplit - 1) / kSplit; }
};

// Softmax state of a unit's rows over some keys: weights are 2^(score - max).
struct Partial {
  float *max, *total, *acc;  // [rows], [rows], [rows][padded_d]
  static i64 floats(i64 rows, i64 padded_d) { return rows * (padded_d + 2 * W); }
  Partial(float* memory, i64 rows, i64 padded_d)
      : max(memory + rows * padded_d), total(max + rows), acc(memory) {}
};

// --- a small matrix product: c[rows][n] (+)= a[rows][k] · b[k][n], one chain per element in the order of k ---

constexpr int kTileRows = W == 8 ? 4 : 6;
constexpr int kTileVectors = W == 8 ? 2 : 4;

// `b(i, j)` is the vector of b at row i, columns j to j + W.
template <int MR, int NV, class B>
INLINE void product_tile(const float* a, i64 lda, B b, i64 j, float* c, i64 ldc, i64 k, bool add) {
  vf acc[MR][NV];
  UNROLL for (int m = 0; m < MR; m++) UNROLL for (int v = 0; v < NV; v++)
    acc[m][v] = add ? load(c + m * ldc + j + v * W) : vf{};
  for (i64 i = 0; i < k; i++) {
    vf row[NV];
    UNROLL for (int v = 0; v < NV; v++) row[v] = b(i, j + v * W);
    UNROLL for (int m = 0; m < MR; m++) {
      vf factor = splat(a[m * lda + i]);
      UNROLL for (int v = 0; v < NV; v++) acc[m][v] = fma(factor, row[v], acc[m][v]);
    }
  }
  UNROLL for (int m = 0; m < MR; m++) UNROLL for (int v = 0; v < NV; v++) store(c + m * ldc + j + v * W, acc[m][v]);
}

template <int MR, class B>
void product_rows(const float* a, i64 lda, B b, float* c, i64 ldc, i64 n, i64 k, bool add) {
  i64 j = 0;
  for (; j + kTileVectors * W <= n; j += kTileVectors * W)
    product_tile<MR, kTileVectors>(a, lda, b, j, c, ldc, k, add);
  for (; j < n; j += W) product_tile<MR, 1>(a, lda, b, j, c, ldc, k, add);
}

template <int MR, class B>
INLINE void product_tail(i64 rows, const float* a, i64 lda, B b, float* c, i64 ldc, i64 n, i64 k, bool add) {
  if constexpr (MR > 0) {
    if (rows == MR) product_rows<MR>(a, lda, b, c, ldc, n, k, add);
    else product_tail<MR - 1>(rows, a, lda, b, c, ldc, n, k, add);
  }
}

template <class B>
INLINE void product(i64 rows, const float* a, i64 lda, B b, float* c, i64 ldc, i64 n, i64 k, bool add) {
  i64 r = 0;
  for (; r + kTileRows <= rows; r += kTileRows)
    product_rows<kTileRows>(a + r * lda, lda, b, c + r * ldc, ldc, n, k, add);
  product_tail<kTileRows - 1>(rows - r, a + r * lda, lda, b, c + r * ldc, ldc, n, k, add);
}

struct Matrix {  // in scratch
  const float* data;
  i64 stride;
  INLINE vf operator()(i64 i, i64 j) const { return load(data + i * stride + j); }
};
template <class T>
struct CachedRows {  // where they lie in the cache, widened on the way
  const typename T::T* const* row;
  INLINE vf operator()(i64 i, i64 j) const { return T::load_run(row[i] + j); }
};

// --- K transposed, V widened ---

template <int S, size_t... I>
INLINE void exchange(vu& a, vu& b, std::index_sequence<I...>) {  // swap a's odd runs of S with b's even ones
#if defined(__clang__)
  vu x = __builtin_shufflevector(a, b, (I & S ? int(W + I - S) : int(I))...);
  vu y = __builtin_shufflevector(a, b, (I & S ? int(W + I) : int(I + S))...);
#else
  vu x = __builtin_shuffle(a, b, vu{(I & S ? uint32_t(W + I - S) : uint32_t(I))...});
  vu y = __builtin_shuffle(a, b, vu{(I & S ? uint32_t(W + I) : uint32_t(I + S))...});
#endif
  a = x, b = y;
}
template <int S>
INLINE void transpose(vu (&rows)[W]) {
  if constexpr (S < W) {
    UNROLL for (int r = 0; r < W; r++)
      if (!(r & S)) exchange<S>(rows[r], rows[r + S], std::make_index_sequence<W>{});
    transpose<S * 2>(rows);
  }
}

// Addresses of positions [begin, end) of one head in a cache, placed in row[position - origin].
template <class E>
INLINE void find_rows(const AttentionArgs& a, const Unit& u, const E* cache, i64 origin, i64 begin, i64 end,
                      const E** row) {
  const int32_t* table = a.tables + u.s * a.table_stride;
  i64 block = begin / a.block_size, offset = begin - block * a.block_size;
  for (i64 i = begin - origin; i < end - origin; block++, offset = 0) {
    const E* p = cache + ((table[block] * a.G + u.g) * a.block_size + offset) * a.D;
    i64 run = a.block_size - offset < end - origin - i ? a.block_size - offset : end - origin - i;
    for (i64 n = 0; n < run; n++, p += a.D) row[i++] = p;
  }
}

INLINE void prefetch_rows(const void* const* row, i64 bytes) {
  for (int r = 0; r < W; r++)
    for (i64 i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(row[r]) + i);
}

// W rows become columns of out[D][kTile].
template <class T>
void load_keys(const typename T::T* const* row, i64 D, float* out) {
  constexpr i64 step = W * T::per_word;  // numbers of one row that fill a vector
  for (i64 d = 0; d < D; d += step) {
    i64 count = D - d < step ? D - d : step;
    vu words[W];
    if (count == step) {
      UNROLL for (int i = 0; i < W; i++) std::memcpy(&words[i], row[i] + d, sizeof(vu));
    } else {
      for (int i = 0; i < W; i++) words[i] = vu{}, std::memcpy(&words[i], row[i] + d, count * sizeof(typename T::T));
    }
    transpose<1>(words);
    float* column = out + d * kTile;
    if (count == step) {
      UNROLL for (int i = 0; i < W; i++) {
        store(column + i * T::per_word * kTile, T::low(words[i]));
        if (T::per_word == 2) store(column + (2 * i + 1) * kTile, T::high(words[i]));
      }
    } else {
      for (int i = 0; i * T::per_word < count; i++) {
        store(column + i * T::per_word * kTile, T::low(words[i]));
        if (T::per_word == 2 && 2 * i + 1 < count) store(column + (2 * i + 1) * kTile, T::high(words[i]));
      }
    }
  }
}

template <class T>
void load_values(const typename T::T* const* row, i64 D, i64 count, i64 padded_d, float* out) {
  for (i64 j = 0; j < count; j++, out += padded_d) {
    i64 d = 0;
    for (; d + W <= D; d += W) store(out + d, T::load_run(row[j] + d));
    for (; d < padded_d; d++) out[d] = d < D ? T::widen(row[j][d]) : 0.f;
  }
}

// --- one unit over one split ---

struct UnitScratch {
  float *q, *scores, *tile;
  i64 zero_floats;
  float* zeros;
  static i64 floats(i64 rows, i64 padded_d) {
    return rows * padded_d + rows * kSplit + kTile * padded_d + padded_d;
  }
  UnitScratch(float* memory, i64 rows, i64 padded_d)
      : q(memory), scores(q + rows * padded_d), tile(scores + rows * kSplit), zero_floats(padded_d),
        zeros(tile + kTile * padded_d) {
    std::memset(zeros, 0, zero_floats * sizeof(float));
  }
};

// Rows of q, scaled so that weights are powers of two.
INLINE void load_queries(const AttentionArgs& a, const Unit& u, float* out) {
  float scale = a.scale * 1.44269504f;
  i64 padded = a.padded_d();
  for (i64 t = u.t0; t < u.t1; t++)
    for (i64 h = 0; h < a.group(); h++, out += padded) {
      const float* q = a.q + t * a.q_token_stride + (u.g * a.group() + h) * a.q_head_stride;
      for (i64 d = 0; d < a.D; d++) out[d] = q[d] * scale;
    }
}

// Scores → weights in columns [0, columns); the row sees columns [begin, end). Returns the largest score.
INLINE float softmax_row(float* scores, i64 first, i64 columns, i64 begin, i64 end, float* total) {
  vi lane;
  for (int i = 0; i < W; i++) lane[i] = i;
  vf top = splat(-kInf);
  for (i64 c = first; c < columns; c += W) {
    vi column = lane + int32_t(c);
    vf s = load(scores + c);
    s = ((column >= int32_t(begin)) & (column < int32_t(end))) ? s : splat(-kInf);
    store(scores + c, s);
    top = vmax(top, s);
  }
  float max = max_lane(top);
  vf base = splat(max == -kInf ? 0.f : max), weights{};
  for (i64 c = first; c < columns; c += W) {
    vf p = exp2(load(scores + c) - base);
    store(scores + c, p);
    weights += p;
  }
  *total = sum(weights);
  return max;
}

template <class T>
void attend_split(const AttentionArgs& a, const Unit& u, i64 split, const UnitScratch& scratch, Partial out) {
  i64 padded = a.padded_d(), rows = u.rows(a), origin = split * kSplit;
  i64 begin = u.begin(a) > origin ? u.begin(a) : origin;
  i64 end = u.end() < origin + kSplit ? u.end() : origin + kSplit;
  i64 first = (begin - origin) / kTile * kTile, columns = end - origin;
  typedef typename T::T E;
  // Rows outside [begin, end) are zeros, never a stale block. One vector of rows more is prefetched, never read.
  const E *k_row[kSplit + W], *v_row[kSplit + W];
  const E* zeros = reinterpret_cast<const E*>(scratch.zeros);
  for (i64 i = first; i < begin - origin; i++) k_row[i] = v_row[i] = zeros;
  for (i64 i = columns, stop = (columns + W - 1) / W * W + W; i < stop; i++) k_row[i] = v_row[i] = zeros;
  find_rows(a, u, static_cast<const E*>(a.k), origin, begin, end, k_row);
  find_rows(a, u, static_cast<const E*>(a.v), origin, begin, end, v_row);
  for (i64 c = first; c < columns; c += kTile) {
    i64 width = (columns - c + W - 1) / W * W;
    if (width > kTile) width = kTile;
    for (i64 j = c; j < c + width; j += W) {
      prefetch_rows((const void* const*)(k_row + j + W), a.D * i64(sizeof(E)));
      prefetch_rows((const void* const*)(v_row + j), a.D * i64(sizeof(E)));
      load_keys<T>(k_row + j, a.D, scratch.tile + j - c);
    }
    product(rows, scratch.q, padded, Matrix{scratch.tile, kTile}, scratch.scores + c, kSplit, width, a.D, false);
  }
  i64 touched = (columns + W - 1) / W * W;
  for (i64 r = 0; r < rows; r++) {
    i64 last = u.position + r / a.group() + 1 - origin;  // one past the row's own position
    i64 from = a.window ? last - a.window : 0;
    out.max[r] = softmax_row(scratch.scores + r * kSplit, first, touched, from, last, out.total + r);
  }
  for (i64 c = begin - origin; c < columns; c += kTile) {
    i64 count = columns - c < kTile ? columns - c : kTile;
    bool add = c != begin - origin;
    if (rows <= kTileRows && a.D == padded) {  // one pass over V: not worth a copy
      product(rows, scratch.scores + c, kSplit, CachedRows<T>{v_row + c}, out.acc, padded, padded, count, add);
    } else {
      load_values<T>(v_row + c, a.D, count, padded, scratch.tile);
      product(rows, scratch.scores + c, kSplit, Matrix{scratch.tile, padded}, out.acc, padded, padded, count, add);
    }
  }
}

// into = into merged with `part`, which holds later positions. Nothing seen (max = -inf) leaves the other exact.
INLINE void merge(Partial into, Partial part, i64 rows, i64 padded) {
  for (i64 r = 0; r < rows; r++) {
    float max = into.max[r] > part.max[r] ? into.max[r] : part.max[r];
    if (max == -kInf) continue;
    vf old = exp2(splat(into.max[r] - max)), now = exp2(splat(part.max[r] - max));
    into.max[r] = max;
    into.total[r] = fma(splat(part.total[r]), now, splat(into.total[r]) * old)[0];
    for (i64 d = 0; d < padded; d += W) {
      float* acc = into.acc + r * padded + d;
      store(acc, fma(load(part.acc + r * padded + d), now, load(acc) * old));
    }
  }
}

INLINE void write_result(const AttentionArgs& a, const Unit& u, Partial p) {
  i64 padded = a.padded_d(), row = 0;
  for (i64 t = u.t0; t < u.t1; t++)
    for (i64 h = 0; h < a.group(); h++, row++) {
      float* out = a.out + (t * a.H + u.g * a.group() + h) * a.D;
      float scale = 1.f / p.total[row];
      for (i64 d = 0; d < a.D; d++) out[d] = p.acc[row * padded + d] * scale;
    }
}

// --- all units ---

INLINE std::vector<Unit> make_units(const AttentionArgs& a) {
  i64 tokens = kUnitRows / a.group();
  if (tokens < 1) tokens = 1;
  std::vector<Unit> units;
  for (i64 s = 0; s < a.S; s++) {
    i64 start = a.query_starts[s], stop = a.query_starts[s + 1];
    for (i64 g = 0; g < a.G; g++)
      for (i64 t = start; t < stop; t += tokens)
        units.push_back({s, g, t, t + tokens < stop ? t + tokens : stop, a.kv_lens[s] - (stop - t)});
  }
  return units;
}

template <class T>
void attend_whole(const AttentionArgs& a, const std::vector<Unit>& units, i64 rows, int threads) {
  i64 padded = a.padded_d(), partial = Partial::floats(rows, padded);
  parallel(i64(units.size()), threads, [&](i64 i) {
    static thread_local Scratch memory;
    float* base = memory.get(size_t(UnitScratch::floats(rows, padded) + 2 * partial));
    const Unit& u = units[units.size() - 1 - i];  // late units see most: start with them
    UnitScratch scratch(base + 2 * partial, rows, padded);
    Partial all(base, rows, padded), part(base + partial, rows, padded);
    load_queries(a, u, scratch.q);
    for (i64 split = u.first_split(a); split < u.last_split(); split++) {
      bool first = split == u.first_split(a);
      attend_split<T>(a, u, split, scratch, first ? all : part);
      if (!first) merge(all, part, u.rows(a), padded);
    }
    write_result(a, u, all);
  });
}

// Few units, long history (decode): splits are spread over the threads, too.
template <class T>
void attend_splits(const AttentionArgs& a, const std::vector<Unit>& units, i64 rows, i64 splits, int threads) {
  static thread_local Scratch partials;
  i64 padded = a.padded_d(), partial = Partial::floats(rows, padded), count = i64(units.size());
  float* parts = partials.get(size_t(count * splits * partial));
  parallel(count * splits, threads, [&](i64 i) {
    static thread_local Scratch memory;
    const Unit& u = units[i % count];
    i64 split = u.first_split(a) + i / count;
    if (split >= u.last_split()) return;
    UnitScratch scratch(memory.get(size_t(UnitScratch::floats(rows, padded))), rows, padded);
    load_queries(a, u, scratch.q);
    attend_split<T>(a, u, split, scratch, Partial(parts + i * partial, rows, padded));
  });
  parallel(count, threads, [&](i64 n) {
    const Unit& u = units[n];
    Partial all(parts + n * partial, rows, padded);
    for (i64 j = 1; j < u.last_split() - u.first_split(a); j++)
      merge(all, Partial(parts + (j * count + n) * partial, rows, padded), u.rows(a), padded);
    write_result(a, u, all);
  });
}

template <class T>
void attend(const AttentionArgs& a) {
  std::vector<Unit> units = make_units(a);
  i64 rows = 1, splits = 1, work = 0;
  for (const Unit& u : units) {
    i64 n = u.last_split() - u.first_split(a);
    rows = u.rows(a) > rows ? u.rows(a) : rows;
    splits = n > splits ? n : splits;
    work += (u.rows(a) + 4) * (u.end() - u.begin(a)) * a.D;
  }
  int threads = team(work, 1 << 16);
  i64 partial_floats = i64(units.size()) * splits * Partial::floats(rows, a.padded_d());
  if (threads > 1 && splits > 1 && i64(units.size()) < 4 * threads && partial_floats < kMaxPartialFloats)
    attend_splits<T>(a, units, rows, splits, threads);
  else
    attend_whole<T>(a, units, rows, threads);
}

}  // namespace foretell
