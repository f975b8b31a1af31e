/* What the kernels share: vectors of four float32, their functions, and the three products.

   All tensors are float32, row-major, and lie in the module's memory; a caller passes addresses. Buffers of
   elementwise kernels are padded to whole vectors, so that these have no remainder. Nothing is linked in, and
   there is no allocator: tensors.js has one.

   exp4 is a Taylor series after reduction of the range. normal4 takes the error function from formula 7.1.26
   of Abramowitz and Stegun 1964, whose absolute error is below 1.5e-7. */

#include <wasm_simd128.h>

#define EXPORT(name) __attribute__((export_name(#name), visibility("default")))
#define INLINE static inline __attribute__((always_inline))

typedef float f4 __attribute__((vector_size(16), aligned(4)));
typedef int i4 __attribute__((vector_size(16), aligned(4)));

INLINE float sum4(f4 x) { return (x[0] + x[2]) + (x[1] + x[3]); }
INLINE f4 all4(float x) { return (f4){x, x, x, x}; }
INLINE f4 load4(const float *p) { return *(const f4 *)p; }
INLINE void store4(float *p, f4 x) { *(f4 *)p = x; }
INLINE int vectors(int n) { return (n + 3) & ~3; }

INLINE f4 exp4(f4 x) {
  x = (f4)wasm_f32x4_max((v128_t)x, (v128_t)all4(-87.0f));
  x = (f4)wasm_f32x4_min((v128_t)x, (v128_t)all4(88.0f));
  f4 n = (f4)wasm_f32x4_nearest((v128_t)(x * 1.44269504f));
  f4 r = (x - n * 0.693359375f) + n * 2.12194440e-4f; /* ln 2 in two parts, the first exact times n */
  f4 p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  i4 power = ((i4)wasm_i32x4_trunc_sat_f32x4((v128_t)n) + 127) << 23;
  return p * (f4)power;
}

/* Phi(x), the normal distribution function, given gauss = exp(-x^2 / 2) */
INLINE f4 normal4(f4 x, f4 gauss) {
  f4 a = (f4)wasm_f32x4_abs((v128_t)x) * 0.707106781f;
  f4 t = 1.0f / (1.0f + 0.3275911f * a);
  f4 p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  f4 upper = 0.5f * p * t * gauss; /* 1 - Phi(|x|) */
  return (f4)wasm_v128_bitselect((v128_t)upper, (v128_t)(1.0f - upper), (v128_t)(x < all4(0)));
}

/* C (m x n) = alpha A B + beta C with A (m x k), B (k x n); nt: of B^T, B (n x k); tn: of A^T, A (k x m).
   lda, ldb, ldc are the distances of rows. */
#define PRODUCT(name)                                                                                        \
  void name(int m, int n, int k, float alpha, const float *a, int lda, const float *b, int ldb, float beta,  \
            float *c, int ldc)
PRODUCT(gemm_nn);
PRODUCT(gemm_nt);
PRODUCT(gemm_tn);
