/* A layer's operations on a CPU in float32: the small ones, which torch does in several calls each, in one, and products,
   which for few rows are bound by reading weights.

   `layers.c` makes whole passes of them.

   Shapes: N rows (tokens), Q queried tokens of a row of the batch, H heads, H_kv key heads, T slots, D head size, F MLP
   width, I inputs and O outputs of a product.

   The sums of a token run in one order, whatever stands beside it, so that its bits do not depend on its batch. Compiled
   without leave to reorder sums. `native.py` compiles and calls it. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define LANES 16

/* exp(x) to about one unit in the last place (the polynomial of Cephes' expf), infinite above 88; NaN stays NaN. */
static inline float exponential(float x) {
    float inside = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
    float whole = inside * 1.44269504088896341f + 12582912.0f; /* 1.5 * 2^23: rounds to the nearest integer */
    int32_t bits;
    memcpy(&bits, &whole, 4);
    whole -= 12582912.0f;
    float r = inside - whole * 0.693359375f + whole * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t power = ((uint32_t)bits + 127u) << 23; /* the low bits of the shifted sum are the integer */
    float scale;
    memcpy(&scale, &power, 4);
    return x > 88.0f ? INFINITY : p * scale;
}

static inline float silu(float x) { return x / (1.0f + exponential(-x)); }

/* y (N, W) = x / rms(x) * weight of rows x (N, W). */
void normed(const float *x, ptrdiff_t rows, ptrdiff_t stride, const float *weight, float *y, ptrdiff_t size, float eps) {
    for (ptrdiff_t n = 0; n < rows; n++, x += stride, y += size) {
        float parts[LANES] = {0}, sum = 0;
        ptrdiff_t i = 0;
        for (; i + LANES <= size; i += LANES)
            for (int l = 0; l < LANES; l++) parts[l] += x[i + l] * x[i + l];
        for (int l = 0; i < size; i++, l++) parts[l] += x[i] * x[i];
        for (int l = 0; l < LANES; l++) sum += parts[l];
        float scale = 1.0f / sqrtf(sum / (float)size + eps);
        for (i = 0; i < size; i++) y[i] = x[i] * scale * weight[i];
    }
}

/* y (N, F) = silu(gate) * up of rows x (N, 2F) = [gate ; up]. */
void gated(const float *x, ptrdiff_t rows, ptrdiff_t stride, float *y, ptrdiff_t size) {
    for (ptrdiff_t n = 0; n < rows; n++, x += stride, y += size) {
        const float *restrict gate = x, *restrict up = x + size;
        float *restrict out = y;
        for (ptrdiff_t i = 0; i < size; i++) out[i] = silu(gate[i]) * up[i];
    }
}

/* The tokens n of first .. first + count - 1: their queries, turned, to q (N, H, D); keys (turned) and values to keys and
   values (B, H_kv, T, D). x (N, (H + 2 H_kv) D), a head's pairs side by side, or of queries alone where H_kv is 0; turns
   (T', D): cos and sin in turn. Of each token: slots (N,) or NULL for n mod Q, by which it turns; rows (N,) or NULL for
   n / Q and places (N,) or NULL for its slot, where its key and value lie. */
void place(const float *x, ptrdiff_t stride, const float *turns, const int64_t *slots, const int64_t *rows,
           const int64_t *places, float *q, float *keys, float *values, ptrdiff_t first, ptrdiff_t count, ptrdiff_t queries, ptrdiff_t heads, ptrdiff_t kv_heads,
           ptrdiff_t length, ptrdiff_t size) {
    for (ptrdiff_t n = first; n < first + count; n++) {
        const float *token = x + n * stride;
        ptrdiff_t slot = slots ? slots[n] : n % queries, row = rows ? rows[n] : n / queries;
        ptrdiff_t kept = places ? places[n] : slot;
        const float *restrict turn = turns + slot * size;
        for (ptrdiff_t h = 0; h < heads + kv_heads; h++) {
            const float *restrict in = token + h * size;
            float *restrict out = h < heads ? q + (n * heads + h) * size
                                            : keys + ((row * kv_heads + h - heads) * length + kept) * size;
            for (ptrdiff_t d = 0; d < size; d += 2) {
                out[d] = in[d] * turn[d] - in[d + 1] * turn[d + 1];
                out[d + 1] = in[d] * turn[d + 1] + in[d + 1] * turn[d];
            }
        }
        for (ptrdiff_t h = 0; h < kv_heads; h++)
            memcpy(values + ((row * kv_heads + h) * length + kept) * size, token + (heads + kv_heads + h) * size,
                   size * sizeof(float));
    }
}

/* ---------------------------------------------------------------- products

   A panel is the weights of PANEL outputs, (I, PANEL): one cache line for each input. GROUP rows meet a panel at once in
   as many registers as WIDTH, the floats of one, leaves. */

#define PANEL 16
#define BLOCK 96 /* rows that meet all panels before the next ones do */
#if defined(__AVX512F__)
#define WIDTH 16
#define GROUP 8
#elif defined(__AVX__)
#define WIDTH 8
#define GROUP 6
#else
#define WIDTH 4
#define GROUP 2
#endif
#define PARTS (PANEL / WIDTH)

typedef float vector __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

/* One panel and `rows` rows, a constant, so that the sums stay in registers; a sum takes its inputs in order, then bias
   and `added`. step: floats from one input's weights to the next one's. Beside input k the cache line at ahead + k * pace
   is fetched: part of what is read next. */
static inline __attribute__((always_inline)) void tile(
    const int rows, const float *x, ptrdiff_t stride, const float *panel, ptrdiff_t step, ptrdiff_t inputs,
    const float *bias, const float *added, float *y, ptrdiff_t outputs, ptrdiff_t columns, const char *ahead,
    ptrdiff_t pace) {
    vector sums[GROUP][PARTS];
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < PARTS; p++) sums[r][p] = (vector){0};
    for (ptrdiff_t k = 0; k < inputs; k++, panel += step, ahead += pace) {
        __builtin_prefetch(ahead);
        vector weights[PARTS];
        for (int p = 0; p < PARTS; p++) weights[p] = *(const vector *)(panel + p * WIDTH);
        for (int r = 0; r < rows; r++)
            for (int p = 0; p < PARTS; p++) sums[r][p] += weights[p] * x[r * stride + k];
    }
    for (int r = 0; r < rows; r++, y += outputs) {
        const float *more = added ? added + r * outputs : NULL;
        if (columns == PANEL) {
            for (int p = 0; p < PARTS; p++) {
                vector sum = sums[r][p];
                if (bias) sum += *(const vector *)(bias + p * WIDTH);
                if (more) sum += *(const vector *)(more + p * WIDTH);
                *(vector *)(y + p * WIDTH) = sum;
            }
        } else {
            float kept[PANEL];
            memcpy(kept, sums[r], sizeof kept);
            for (ptrdiff_t c = 0; c < columns; c++) {
                float sum = kept[c];
                if (bias) sum += bias[c];
                if (more) sum += more[c];
                y[c] = sum;
            }
        }
    }
}

/* `tile` of 1 to GROUP rows. */
static void tiled(ptrdiff_t rows, const float *x, ptrdiff_t stride, const float *panel, ptrdiff_t step, ptrdiff_t inputs,
                  const float *bias, const float *added, float *y, ptrdiff_t outputs, ptrdiff_t columns,
                  const char *ahead, ptrdiff_t pace) {
#define CASE(n) case n: tile(n, x, stride, panel, step, inputs, bias, added, y, outputs, columns, ahead, pace); break;
    switch (rows) {
        CASE(1) CASE(2)
#if GROUP >= 6
        CASE(3) CASE(4) CASE(5) CASE(6)
#endif
#if GROUP >= 8
        CASE(7) CASE(8)
#endif
    }
#undef CASE
}

/* A linear layer: panels (O / PANEL, I, PANEL), the last filled up, and bias (O,) or NULL. Of gate and up together
   (`both`) O is the width F of one, panels are those of the gate and of up in turn, bias is (2F,). */
struct linear {
    const float *panels, *bias;
    ptrdiff_t inputs, outputs, both;
};

/* Some columns of a product, which begin at a panel: y = x W^T [+ bias] [+ added], or silu(gate) * up; y and added are
   rows of O numbers. */
static void columns_of(const struct linear *layer, const float *x, ptrdiff_t rows, ptrdiff_t stride, const float *added,
                       float *y, ptrdiff_t from, ptrdiff_t to) {
    ptrdiff_t inputs = layer->inputs, outputs = layer->outputs, size = PANEL * inputs, pair = layer->both ? 2 : 1;
    float halves[2][GROUP * PANEL];
    for (ptrdiff_t first = 0; first < rows; first += BLOCK) {
        ptrdiff_t count = rows - first < BLOCK ? rows - first : BLOCK, groups = (count + GROUP - 1) / GROUP;
        ptrdiff_t pace = PANEL * (ptrdiff_t)sizeof(float) / groups; /* the groups fetch the next panel between them */
        for (ptrdiff_t c = from; c < to; c += PANEL) {
            ptrdiff_t wide = outputs - c < PANEL ? outputs - c : PANEL;
            const float *panel = layer->panels + pair * c * inputs, *bias = layer->bias ? layer->bias + c : NULL;
            const char *ahead = (const char *)(panel + pair * size);
            for (ptrdiff_t g = 0; g < groups; g++, ahead += pace * inputs) {
                ptrdiff_t row = first + count * g / groups, many = first + count * (g + 1) / groups - row;
                const float *at = x + row * stride;
                float *out = y + row * outputs + c;
                if (pair == 1) {
                    tiled(many, at, stride, panel, PANEL, inputs, bias, added ? added + row * outputs + c : NULL, out,
                          outputs, wide, ahead, pace);
                    continue;
                }
                for (int half = 0; half < 2; half++)
                    tiled(many, at, stride, panel + half * size, PANEL, inputs, bias ? bias + half * outputs : NULL, NULL,
                          halves[half], PANEL, wide, ahead + half * size * (ptrdiff_t)sizeof(float), pace);
                for (ptrdiff_t r = 0; r < many; r++)
                    for (ptrdiff_t i = 0; i < wide; i++)
                        out[r * outputs + i] = silu(halves[0][r * PANEL + i]) * halves[1][r * PANEL + i];
            }
        }
    }
}
