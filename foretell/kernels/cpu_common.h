// Vectors of the widest kind this CPU has, the three number formats, and the parallel loop.
//
// The build uses -ffp-contract=off: a multiply and an add fuse exactly where `fma` says so, hence a result
// depends on the order written here and not on what the compiler made of one instantiation or another.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu_pool.h"

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 64")
#endif
#define INLINE inline __attribute__((always_inline))

namespace foretell {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define FORETELL_AVX512 1
constexpr int W = 16;  // floats in one vector
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define FORETELL_AVX2 1
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));

constexpr float kInf = std::numeric_limits<float>::infinity();

INLINE vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
INLINE vu load(const uint32_t* p) {
  vu v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
INLINE void store(uint32_t* p, vu v) { std::memcpy(p, &v, sizeof v); }

INLINE vf splat(float x) {
#if defined(FORETELL_AVX512)
  return (vf)_mm512_set1_ps(x);
#elif defined(FORETELL_AVX2)
  return (vf)_mm256_set1_ps(x);
#else
  return vf{x, x, x, x};
#endif
}
INLINE vu splat_word(uint32_t x) { return x - vu{}; }

INLINE vf fma(vf a, vf b, vf c) {
#if defined(FORETELL_AVX512)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(FORETELL_AVX2)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }

// Halving in a fixed order: the same lanes always give the same sum.
INLINE float sum(vf v) {
  float lane[W];
  std::memcpy(lane, &v, sizeof v);
  UNROLL for (int step = W / 2; step; step /= 2) UNROLL for (int i = 0; i < step; i++) lane[i] += lane[i + step];
  return lane[0];
}
INLINE float max_lane(vf v) {
  float lane[W];
  std::memcpy(lane, &v, sizeof v);
  UNROLL for (int step = W / 2; step; step /= 2) UNROLL for (int i = 0; i < step; i++)
    lane[i] = lane[i] > lane[i + step] ? lane[i] : lane[i + step];
  return lane[0];
}

// 2^x for x ≤ 127, relative error below 1e-7; exactly 1 at 0 and exactly 0 at -inf and below -125.
INLINE vf exp2(vf x) {
  const vf magic = splat(12582912.f);  // 1.5 · 2^23: adding it rounds to an integer, left in the low bits
  vf in = vmax(x, splat(-126.f));
  vf t = in + magic;
  vf f = in - (t - magic);
  vf p = splat(1.5353362e-4f);
  p = fma(p, f, splat(1.3398874e-3f));
  p = fma(p, f, splat(9.6184373e-3f));
  p = fma(p, f, splat(5.5503324e-2f));
  p = fma(p, f, splat(2.4022648e-1f));
  p = fma(p, f, splat(6.9314720e-1f));
  p = fma(p, f, splat(1.f));
  vf y = (vf)((vu)p + ((vu)t << 23));
  return x < splat(-125.f) ? vf{} : y;
}

// --- number formats: memory holds 32-bit words, each one float or two halves (low half first) ---

INLINE float f16_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#elif defined(__aarch64__)
  __fp16 x;
  std::memcpy(&x, &h, 2);
  return x;
#else
  uint32_t sign = (h & 0x8000u) << 16, e = (h >> 10) & 31, m = h & 1023;
  float v = e == 31 ? (m ? NAN : kInf) : e ? std::ldexp(float(m | 1024), int(e) - 25) : std::ldexp(float(m), -24);
  return sign ? -v : v;
#endif
}
INLINE uint16_t float_to_f16(float x) {
#if defined(__F16C__)
  return _cvtss_sh(x, 0);
#elif defined(__aarch64__)
  __fp16 h = (__fp16)x;
  uint16_t out;
  std::memcpy(&out, &h, 2);
  return out;
#else
  uint32_t u;
  std::memcpy(&u, &x, 4);
  uint16_t sign = uint16_t((u >> 16) & 0x8000);
  float a = std::fabs(x);
  if (a != a) return uint16_t(sign | 0x7e00);
  if (a >= 65520.f) return uint16_t(sign | 0x7c00);
  if (a < 6.1035156e-5f) return uint16_t(sign | uint16_t(std::nearbyint(std::ldexp(a, 24))));
  int e;
  float m = std::frexp(a, &e);  // a = m · 2^e, m in [1/2, 1)
  return uint16_t(sign | uint16_t((unsigned(e + 14) << 10) + unsigned(std::nearbyint(m * 2048.f)) - 1024));
#endif
}
INLINE float bf16_to_float(uint16_t h) {
  uint32_t u = uint32_t(h) << 16;
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
INLINE uint16_t float_to_bf16(float x) {  // to nearest, ties to even
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if (x != x) return uint16_t((u >> 16) | 0x40);
  return uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

INLINE vu spread(const uint16_t* p) {  // W halves, one to a word
#if defined(FORETELL_AVX512)
  return (vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif defined(FORETELL_AVX2)
  return (vu)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#else
  vu words;
  UNROLL for (int i = 0; i < W; i++) words[i] = p[i];
  return words;
#endif
}

struct F32 {
  typedef float T;
  static constexpr int per_word = 1;
  static INLINE vf low(vu w) { return (vf)w; }
  static INLINE vf high(vu w) { return (vf)w; }  // never called: one number per word
  static INLINE vf load_run(const float* p) { return load(p); }
  static INLINE float widen(float x) { return x; }
  static INLINE float narrow(float x) { return x; }
};

struct BF16 {
  typedef uint16_t T;
  static constexpr int per_word = 2;
  static INLINE vf low(vu w) { return (vf)(w << 16); }
  static INLINE vf high(vu w) { return (vf)(w & 0xffff0000u); }
  static INLINE vf load_run(const uint16_t* p) { return (vf)(spread(p) << 16); }
  static INLINE float widen(uint16_t x) { return bf16_to_float(x); }
  static INLINE uint16_t narrow(float x) { return float_to_bf16(x); }
};

struct F16 {
  typedef uint16_t T;
  static constexpr int per_word = 2;
  static INLINE vf halves(vu w) {  // each word holds a half in its low bits, zero above
#if defined(FORETELL_AVX512)
    return (vf)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)w));
#elif defined(FORETELL_AVX2)
    __m128i lo = _mm256_castsi256_si128((__m256i)w), hi = _mm256_extracti128_si256((__m256i)w, 1);
    return (vf)_mm256_cvtph_ps(_mm_packus_epi32(lo, hi));
#elif defined(__aarch64__)
    return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32((uint32x4_t)w)));
#else
    vf out;
    for (int i = 0; i < W; i++) out[i] = f16_to_float(uint16_t(w[i]));
    return out;
#endif
  }
  static INLINE vf low(vu w) { return halves(w & 0xffffu); }
  static INLINE vf high(vu w) { return halves(w >> 16); }
  static INLINE vf load_run(const uint16_t* p) { return halves(spread(p)); }
  static INLINE float widen(uint16_t x) { return f16_to_float(x); }
  static INLINE uint16_t narrow(float x) { return float_to_f16(x); }
};

// acc + factor · weight; BF16Dot has its own.
template <class T>
INLINE vf multiply_add(vf factor, vf weight, vf acc) {
  return fma(factor, weight, acc);
}

#if defined(FORETELL_AVX512) && (defined(__AVX512BF16__) || defined(FORETELL_EMULATE_DOT))
#define FORETELL_DOT 1
// Bfloat16 weights met by activations rounded to bfloat16, two products an instruction: twice the rate.
struct BF16Dot {
  typedef uint16_t T;
  static constexpr int per_word = 1;  // factors a word of weights takes: one, that holds two numbers
  static INLINE vf low(vu w) { return (vf)w; }
  static INLINE vf high(vu w) { return (vf)w; }
};
template <>
INLINE vf multiply_add<BF16Dot>(vf factor, vf weight, vf acc) {
#if defined(__AVX512BF16__)
  return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)factor, (__m512bh)weight);
#else
  acc = fma(BF16::high((vu)factor), BF16::high((vu)weight), acc);
  return fma(BF16::low((vu)factor), BF16::low((vu)weight), acc);
#endif
}
#endif

enum Format { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// --- threads and scratch memory ---

INLINE int team(i64 work, i64 worth_a_thread) {  // threads for `work`: below a microsecond each, waking one loses
  i64 n = work / worth_a_thread;
  return n < 1 ? 1 : n < g_threads ? int(n) : g_threads;
}
// Grows and stays, one per thread: no page faults in steady state.
struct Scratch {
  float* data = nullptr;
  size_t bytes = 0;
  ~Scratch() { std::free(data); }
  float* get(size_t floats) {
    size_t need = (floats * sizeof(float) + 4095) & ~size_t(4095);
    if (need > bytes) {
      std::free(data);
      data = static_cast<float*>(std::aligned_alloc(4096, need));
      bytes = data ? need : 0;
    }
    return data;
  }
};

// Weights are read from end to end at every step: large pages save a table walk every 4 KiB.
INLINE void want_huge_pages(void* memory, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t page = uintptr_t(1) << 21, start = reinterpret_cast<uintptr_t>(memory);
  uintptr_t first = (start + page - 1) & ~(page - 1), last = (start + bytes) & ~(page - 1);
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace foretell
