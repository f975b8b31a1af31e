/* The parts of the network and of the optimiser: what a training step does besides matrix products.

   Names of sizes: n tokens or numbers, c width of the residual stream, b sequences, t time, h heads, d width
   of a head, v characters. */

#include "vectors.h"

#define LARGEST_ROW 1024

static f4 row_of_vectors[LARGEST_ROW / 4];

EXPORT(add) void add(float *y, const float *x, int n) { /* y += x */
  for (int i = 0; i < n; i += 4)
    store4(y + i, load4(y + i) + load4(x + i));
}

EXPORT(dot) float dot(const float *x, const float *y, int n) { /* n a multiple of 4 */
  f4 sum = all4(0);
  for (int i = 0; i < n; i += 4)
    sum += load4(x + i) * load4(y + i);
  return sum4(sum);
}

EXPORT(signs) void signs(float *y, const float *x, float size, int n) { /* y = size sign(x) */
  for (int i = 0; i < n; i++)
    y[i] = x[i] > 0 ? size : x[i] < 0 ? -size : 0;
}

EXPORT(gelu) void gelu(float *y, const float *x, int n) { /* y = x Phi(x) */
  for (int i = 0; i < n; i += 4) {
    f4 u = load4(x + i);
    store4(y + i, u * normal4(u, exp4(-0.5f * u * u)));
  }
}

EXPORT(gelu_backward) void gelu_backward(float *grad, const float *x, int n) { /* grad *= Phi(x) + x phi(x) */
  for (int i = 0; i < n; i += 4) {
    f4 u = load4(x + i), gauss = exp4(-0.5f * u * u);
    store4(grad + i, load4(grad + i) * (normal4(u, gauss) + 0.398942280f * u * gauss));
  }
}

/* A step of AdamW: correction1 and correction2 are 1 - beta^t, clip is what the gradient is multiplied by */
EXPORT(adamw)
void adamw(float *p, const float *grad, float *first, float *second, int n, float lr, float beta1,
           float beta2, float eps, float decay, float correction1, float correction2, float clip) {
  float size = lr / correction1, root = 1 / __builtin_sqrtf(correction2);
  for (int i = 0; i < n; i += 4) {
    f4 g = load4(grad + i) * clip;
    f4 m = load4(first + i) + (1 - beta1) * (g - load4(first + i));
    f4 v = beta2 * load4(second + i) + (1 - beta2) * g * g;
    store4(first + i, m);
    store4(second + i, v);
    f4 bottom = (f4)wasm_f32x4_sqrt((v128_t)v) * root + eps;
    store4(p + i, load4(p + i) * (1 - lr * decay) - size * m / bottom);
  }
}

EXPORT(embed)
void embed(float *x, const int *ids, const float *token, const float *position, int n, int t, int c) {
  for (int i = 0; i < n; i++)
    for (int j = 0; j < c; j += 4)
      store4(x + i * c + j, load4(token + ids[i] * c + j) + load4(position + (i % t) * c + j));
}

EXPORT(embed_backward)
void embed_backward(float *token, float *position, const int *ids, const float *grad, int n, int t, int c) {
  for (int i = 0; i < n; i++) {
    add(token + ids[i] * c, grad + i * c, c);
    add(position + (i % t) * c, grad + i * c, c);
  }
}

/* y = gain z + shift with z = (x - mean x) / sigma, eps 1e-5; z and 1 / sigma are kept */
EXPORT(layer_norm)
void layer_norm(float *y, float *z, float *inverse, const float *x, const float *gain, const float *shift,
                int n, int c) {
  for (int i = 0; i < n; i++, x += c, y += c, z += c) {
    f4 sum = all4(0), squares = all4(0);
    for (int j = 0; j < c; j += 4)
      sum += load4(x + j);
    float mean = sum4(sum) / c;
    for (int j = 0; j < c; j += 4)
      squares += (load4(x + j) - mean) * (load4(x + j) - mean);
    inverse[i] = 1 / __builtin_sqrtf(sum4(squares) / c + 1e-5f);
    for (int j = 0; j < c; j += 4) {
      f4 u = (load4(x + j) - mean) * inverse[i];
      store4(z + j, u);
      store4(y + j, u * load4(gain + j) + load4(shift + j));
    }
  }
}

/* grad_x += (u - mean u - z mean(u z)) / sigma with u = gain grad; the gradients of gain and shift grow too
 */
EXPORT(layer_norm_backward)
void layer_norm_backward(float *grad_x, float *grad_gain, float *grad_shift, const float *grad,
                         const float *z, const float *inverse, const float *gain, int n, int c) {
  for (int i = 0; i < n; i++, grad_x += c, grad += c, z += c) {
    f4 sum = all4(0), along = all4(0);
    for (int j = 0; j < c; j += 4) {
      f4 g = load4(grad + j), u = g * load4(gain + j);
      sum += u;
      along += u * load4(z + j);
      store4(grad_gain + j, load4(grad_gain + j) + g * load4(z + j));
      store4(grad_shift + j, load4(grad_shift + j) + g);
    }
    float mean = sum4(sum) / c, share = sum4(along) / c;
    for (int j = 0; j < c; j += 4) {
      f4 u = load4(grad + j) * load4(gain + j) - mean - load4(z + j) * share;
      store4(grad_x + j, load4(grad_x + j) + u * inverse[i]);
    }
  }
}

/* y = A v, A = sigmoid(q k^T / sqrt d + bias), 0 where the key comes later. q, k, v, y are (b, t, h, d), A is
   (b, h, t, w) with w = t rounded up to whole vectors */
EXPORT(attend)
void attend(float *y, float *weights, const float *q, const float *k, const float *v, int b, int t, int h,
            int d, float bias) {
  int c = h * d, w = vectors(t);
  float scale = 1 / __builtin_sqrtf((float)d);
  for (int s = 0; s < b * h; s++) {
    int start = s / h * t * c + s % h * d;
    float *a = weights + s * t * w;
    gemm_nt(t, t, d, scale, q + start, c, k + start, c, 0, a, w);
    for (int i = 0; i < t; i++)
      for (int j = 0; j < w; j += 4) {
        i4 seen = ((i4){0, 1, 2, 3} + j) <= i;
        f4 sigmoid = 1.0f / (1.0f + exp4(-(load4(a + i * w + j) + bias)));
        store4(a + i * w + j, (f4)((i4)sigmoid & seen));
      }
    gemm_nn(t, d, t, 1, a, w, v + start, c, 0, y + start, c);
  }
}

/* With dA = dy v^T and dS = A (1 - A) dA: dq = dS k / sqrt d, dk = dS^T q / sqrt d, dv = A^T dy */
EXPORT(attend_backward)
void attend_backward(float *grad_q, float *grad_k, float *grad_v, float *scores, const float *grad,
                     const float *weights, const float *q, const float *k, const float *v, int b, int t,
                     int h, int d) {
  int c = h * d, w = vectors(t);
  float scale = 1 / __builtin_sqrtf((float)d);
  for (int s = 0; s < b * h; s++) {
    int start = s / h * t * c + s % h * d;
    const float *a = weights + s * t * w;
    gemm_nt(t, t, d, 1, grad + start, c, v + start, c, 0, scores, w);
    for (int i = 0; i < t * w; i += 4)
      store4(scores + i, load4(scores + i) * load4(a + i) * (1.0f - load4(a + i)));
    gemm_nn(t, d, t, scale, scores, w, k + start, c, 0, grad_q + start, c);
    gemm_tn(t, d, t, scale, scores, w, q + start, c, 0, grad_k + start, c);
    gemm_tn(t, d, t, 1, a, w, grad + start, c, 0, grad_v + start, c);
  }
}

/* ln x = e ln 2 + 2 artanh((m - 1) / (m + 1)) for x = m 2^e, m within [1/sqrt 2, sqrt 2) */
static float log1(float x) {
  union {
    float f;
    int i;
  } u = {x};
  int e = ((u.i >> 23) & 255) - 127;
  u.i = (u.i & 0x7fffff) | (127 << 23);
  if (u.f > 1.41421356f)
    u.f *= 0.5f, e += 1;
  float s = (u.f - 1) / (u.f + 1), q = s * s;
  return e * 0.693147181f + 2 * s * (1 + q * (1.0f / 3 + q * (1.0f / 5 + q * (1.0f / 7 + q * (1.0f / 9)))));
}

/* The mean of -ln softmax(logits)[target] over n tokens; error = (softmax(logits) - onehot(target)) / n */
EXPORT(cross_entropy)
float cross_entropy(float *error, const float *logits, const int *targets, int n, int v) {
  if (v > LARGEST_ROW)
    __builtin_trap();
  float *row = (float *)row_of_vectors;
  double total = 0;
  for (int i = 0; i < n; i++, logits += v, error += v) {
    float largest = logits[0];
    for (int j = 1; j < v; j++)
      largest = logits[j] > largest ? logits[j] : largest;
    for (int j = 0; j < vectors(v); j++)
      row[j] = j < v ? logits[j] - largest : -1e9f;
    f4 sum = all4(0);
    for (int j = 0; j < v; j += 4) {
      f4 e = exp4(load4(row + j));
      store4(row + j, e);
      sum += e;
    }
    float whole = sum4(sum), share = 1 / (whole * n);
    for (int j = 0; j < v; j++)
      error[j] = row[j] * share;
    error[targets[i]] -= 1.0f / n;
    total += log1(whole) + largest - logits[targets[i]];
  }
  return total / n;
}
