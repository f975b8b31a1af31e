/* Matrix products in three layouts over one tile of 4 x 8 numbers that stays in registers. */

#include "vectors.h"

#define LARGEST_PACKED (1 << 16)

static float packed[LARGEST_PACKED]; /* the transpose of B in a product with B^T */

/* An R x 4Q tile of C = alpha A B + beta C; the entry (i, p) of A is a[i ai + p ap], B is k x (at least 4Q)
 */
INLINE void tile(const int R, const int Q, int k, float alpha, const float *a, int ai, int ap, const float *b,
                 int ldb, float beta, float *c, int ldc) {
  f4 sums[4][2];
  for (int i = 0; i < R; i++)
    for (int q = 0; q < Q; q++)
      sums[i][q] = all4(0);
  for (int p = 0; p < k; p++) {
    f4 right[2];
    for (int q = 0; q < Q; q++)
      right[q] = load4(b + p * ldb + 4 * q);
    for (int i = 0; i < R; i++)
      for (int q = 0; q < Q; q++)
        sums[i][q] += a[i * ai + p * ap] * right[q];
  }
  for (int i = 0; i < R; i++)
    for (int q = 0; q < Q; q++) {
      float *out = c + i * ldc + 4 * q;
      f4 sum = alpha * sums[i][q];
      store4(out, beta == 0 ? sum : sum + beta * load4(out));
    }
}

INLINE void columns(const int Q, int m, int k, float alpha, const float *a, int ai, int ap, const float *b,
                    int ldb, float beta, float *c, int ldc) {
  int i = 0;
  for (; i + 4 <= m; i += 4)
    tile(4, Q, k, alpha, a + i * ai, ai, ap, b, ldb, beta, c + i * ldc, ldc);
  for (; i < m; i++)
    tile(1, Q, k, alpha, a + i * ai, ai, ap, b, ldb, beta, c + i * ldc, ldc);
}

static void product(int m, int n, int k, float alpha, const float *a, int ai, int ap, const float *b, int ldb,
                    float beta, float *c, int ldc) {
  int j = 0;
  for (; j + 8 <= n; j += 8)
    columns(2, m, k, alpha, a, ai, ap, b + j, ldb, beta, c + j, ldc);
  for (; j + 4 <= n; j += 4)
    columns(1, m, k, alpha, a, ai, ap, b + j, ldb, beta, c + j, ldc);
  for (; j < n; j++)
    for (int i = 0; i < m; i++) {
      float sum = 0;
      for (int p = 0; p < k; p++)
        sum += a[i * ai + p * ap] * b[p * ldb + j];
      c[i * ldc + j] = alpha * sum + (beta == 0 ? 0 : beta * c[i * ldc + j]);
    }
}

EXPORT(gemm_nn) PRODUCT(gemm_nn) { product(m, n, k, alpha, a, lda, 1, b, ldb, beta, c, ldc); }

EXPORT(gemm_tn) PRODUCT(gemm_tn) { product(m, n, k, alpha, a, 1, lda, b, ldb, beta, c, ldc); }

/* B is transposed once; it may have LARGEST_PACKED numbers. */
EXPORT(gemm_nt) PRODUCT(gemm_nt) {
  if (n * k > LARGEST_PACKED)
    __builtin_trap();
  for (int j = 0; j < n; j++)
    for (int p = 0; p < k; p++)
      packed[p * n + j] = b[j * ldb + p];
  product(m, n, k, alpha, a, lda, 1, packed, n, beta, c, ldc);
}
