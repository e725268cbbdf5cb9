// The entry points that Python calls with plain addresses. Built at first use, see cpu_build.py.
#include "cpu_attention.h"
#include "cpu_common.h"
#include "cpu_elementwise.h"
#include "cpu_linear.h"
#include "cpu_quant.h"

namespace foretell {
int g_threads = 1;
Pool* g_pool = new Pool;  // never deleted: its threads live as long as the process

// The threads of a pool stay behind in the parent of a fork: the child starts with a pool of its own.
static const int g_at_fork = pthread_atfork(nullptr, nullptr, [] { g_pool = new Pool; });

template <class F>
void with_format(int format, F f) {
  if (format == kFloat32) f(F32{});
  else if (format == kBFloat16) f(BF16{});
  else f(F16{});
}

template <int A>
void activate(const float* x, const float* up, i64 rows, i64 n, i64 stride, float* y) {
  parallel_runs(rows, team(rows * n, kElementsPerThread), [&](i64 begin, i64 end) {
    for (i64 r = begin; r < end; r++) act_row<A>(x + r * stride, up ? up + r * stride : nullptr, n, y + r * n);
  });
}
}  // namespace foretell

using namespace foretell;

extern "C" {

void ft_set_threads(int n) { g_threads = n < 1 ? 1 : n; }

i64 ft_packed_words(i64 N, i64 K, int format) {
  i64 per_word = format == kFloat32 ? 1 : 2;
  return (N + NR - 1) / NR * NR * ((K + per_word - 1) / per_word);
}

void ft_pack_weight(const char* w, i64 N, i64 K, i64 row_bytes, int format, uint32_t* out) {
  with_format(format, [&](auto f) { pack_weight<decltype(f)>(w, N, K, row_bytes, out); });
}

int ft_rounds_activations() {  // whether `exact` makes a difference to ft_linear
#ifdef FORETELL_DOT
  return 1;
#else
  return 0;
#endif
}

void ft_linear(const float* x, i64 ldx, i64 M, i64 N, i64 K, const uint32_t* w, const float* bias, float* y,
               int format, int exact) {
#ifdef FORETELL_DOT
  if (format == kBFloat16 && !exact && M >= kDotRows) return multiply<BF16Dot>({x, ldx, M, N, K, w, bias, y});
#endif
  (void)exact;
  with_format(format, [&](auto f) { multiply<decltype(f)>({x, ldx, M, N, K, w, bias, y}); });
}

i64 ft_quant_bytes(i64 N, i64 K, int type) {
  i64 bytes = 0;
  with_quant(type, [&](auto f) { bytes = quant_bytes<decltype(f)>(N, K); });
  return bytes;
}

void ft_pack_quant(const uint8_t* raw, i64 N, i64 K, i64 row_bytes, int type, uint8_t* out) {
  with_quant(type, [&](auto f) { pack_quant<decltype(f)>(raw, N, K, row_bytes, out); });
}

void ft_linear_quant(const float* x, i64 ldx, i64 M, i64 N, i64 K, const uint8_t* w, const float* bias, float* y,
                     int type) {
  QuantArgs a{{x, ldx, M, N, K, nullptr, bias, y}, w};
  with_quant(type, [&](auto f) { multiply_quant<decltype(f)>(a); });
}

// Rows in two levels, heads within tokens, as a strided view of qkv has them.
void ft_rms_norm(const float* x, const float* w, i64 outer, i64 inner, i64 far, i64 near, i64 C, float eps,
                 float* y) {
  parallel_runs(outer, team(outer * inner * C, kElementsPerThread), [&](i64 begin, i64 end) {
    for (i64 o = begin; o < end; o++)
      for (i64 i = 0; i < inner; i++) rms_norm_row(x + o * far + i * near, w, C, eps, y + (o * inner + i) * C);
  });
}

void ft_layer_norm(const float* x, const float* w, const float* b, i64 rows, i64 C, i64 stride, float eps, float* y) {
  parallel_runs(rows, team(rows * C, kElementsPerThread), [&](i64 begin, i64 end) {
    for (i64 r = begin; r < end; r++) layer_norm_row(x + r * stride, w, b, C, eps, y + r * C);
  });
}

void ft_activate(const float* x, const float* up, i64 rows, i64 n, i64 stride, int kind, float* y) {
  if (kind == kSilu) activate<kSilu>(x, up, rows, n, stride, y);
  else if (kind == kGelu) activate<kGelu>(x, up, rows, n, stride, y);
  else if (kind == kGeluTanh) activate<kGeluTanh>(x, up, rows, n, stride, y);
  else activate<kRelu>(x, up, rows, n, stride, y);
}

void ft_rope(float* x, i64 tokens, i64 heads, i64 token_stride, i64 head_stride, const float* cos, const float* sin,
             i64 R) {
  parallel_runs(tokens, team(tokens * heads * R * 2, kElementsPerThread), [&](i64 begin, i64 end) {
    for (i64 t = begin; t < end; t++)
      for (i64 h = 0; h < heads; h++)
        rope_head(x + t * token_stride + h * head_stride, cos + t * R, sin + t * R, R);
  });
}

// k, v [M, G, D], strided alike or not → caches [blocks, G, block_size, D] at slots.
void ft_write_kv(const float* k, const float* v, i64 k_token_stride, i64 k_head_stride, i64 v_token_stride,
                 i64 v_head_stride, i64 M, i64 G, i64 D, const i64* slots, i64 block_size, void* k_cache, void* v_cache,
                 int format) {
  with_format(format, [&](auto f) {
    using T = decltype(f);
    auto *k_out = static_cast<typename T::T*>(k_cache), *v_out = static_cast<typename T::T*>(v_cache);
    parallel_runs(M, team(M * G * D, kElementsPerThread), [&](i64 begin, i64 end) {
      for (i64 t = begin; t < end; t++) for (i64 g = 0; g < G; g++) {
        i64 block = slots[t] / block_size, offset = slots[t] % block_size;
        i64 to = ((block * G + g) * block_size + offset) * D;
        narrow_row<T>(k + t * k_token_stride + g * k_head_stride, D, k_out + to);
        narrow_row<T>(v + t * v_token_stride + g * v_head_stride, D, v_out + to);
      }
    });
  });
}

void ft_attention(const float* q, i64 q_token_stride, i64 q_head_stride, const void* k, const void* v,
                  const int32_t* tables, i64 table_stride, const int32_t* query_starts, const int32_t* kv_lens, i64 S,
                  i64 H, i64 G, i64 D, i64 block_size, i64 window, float scale, float* out, int format) {
  AttentionArgs a{q, q_token_stride, q_head_stride, k, v, tables, table_stride, query_starts, kv_lens,
                  S, H, G, D, block_size, window, scale, out};
  with_format(format, [&](auto f) { attend<decltype(f)>(a); });
}

}  // extern "C"
