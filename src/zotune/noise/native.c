/* The noise of reference.py in C: the same bits as the numba kernels of kernels.py, in less memory and time.
 *
 * Compiled by native.py where there is a compiler, without fused multiply-add and without any of the
 * liberties of fast-math: the specification fixes every operation and its order. */
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { RADEMACHER = 1, GAUSSIAN = 2, ROUNDING = 3, MASK = 4 };
enum { FLOAT = 0, BFLOAT16 = 1, FLOAT16 = 2, DOUBLE = 3 };
enum { TILE = 1024, MARGIN = 128 };

static inline uint32_t bits_of(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
static inline float float_of(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }
static inline float half_to_float(uint16_t h) { _Float16 x; memcpy(&x, &h, 2); return (float)x; }
static inline uint16_t half_of(float x) { _Float16 y = (_Float16)x; uint16_t h; memcpy(&h, &y, 2); return h; }

static inline void philox(uint64_t block, uint32_t tensor, uint32_t stream, uint64_t seed, uint32_t w[4]) {
    uint32_t c0 = (uint32_t)block, c1 = (uint32_t)(block >> 32), c2 = tensor, c3 = stream;
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)p1;
        c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    w[0] = c0; w[1] = c1; w[2] = c2; w[3] = c3;
}

/* a times the signs of `blocks` blocks of 128. */
static void signs(float *out, float a, uint64_t seed, uint32_t tensor, uint64_t first, int blocks) {
    const uint32_t positive = bits_of(a);
    for (int b = 0; b < blocks; b++) {
        uint32_t w[4], signed_a[128];
        philox(first + b, tensor, RADEMACHER, seed, w);
        for (int j = 0; j < 4; j++)
            for (int k = 0; k < 32; k++) signed_a[32 * j + k] = positive ^ ((w[j] >> k) << 31);
        memcpy(out + 128 * b, signed_a, sizeof signed_a);
    }
}

static inline void normal_pair(uint32_t word_r, uint32_t word_a, float *even, float *odd) {
    float x = ((float)word_r + 0.5f) * 0x1p-32f;
    int32_t bits = (int32_t)bits_of(x);
    int32_t e = (bits - 0x3F3504F3) >> 23;
    float m = float_of((uint32_t)bits - ((uint32_t)e << 23));
    float s = (m - 1.0f) / (m + 1.0f), z = s * s, p = (float)(1.0 / 9);
    p = p * z + (float)(1.0 / 7);
    p = p * z + (float)(1.0 / 5);
    p = p * z + (float)(1.0 / 3);
    p = p * z + 1.0f;
    float r = sqrtf(-2.0f * (2.0f * s * p + (float)e * 0.6931471805599453f));

    uint32_t turned = word_a + (1u << 29), quadrant = turned >> 30;
    float y = (float)((int32_t)(turned & 0x3FFFFFFFu) - (1 << 29)) * (float)(1.5707963267948966 / (1 << 30));
    z = y * y;
    float sine = (float)(1.0 / 362880), cosine = (float)(-1.0 / 3628800);
    sine = sine * z + (float)(-1.0 / 5040);
    sine = sine * z + (float)(1.0 / 120);
    sine = sine * z + (float)(-1.0 / 6);
    sine = sine * z + 1.0f;
    sine = sine * y;
    cosine = cosine * z + (float)(1.0 / 40320);
    cosine = cosine * z + (float)(-1.0 / 720);
    cosine = cosine * z + (float)(1.0 / 24);
    cosine = cosine * z + (float)(-1.0 / 2);
    cosine = cosine * z + 1.0f;
    float c = quadrant & 1 ? sine : cosine, d = quadrant & 1 ? cosine : sine;
    c = float_of(bits_of(c) ^ (((quadrant + 1) & 2) << 30));
    d = float_of(bits_of(d) ^ ((quadrant & 2) << 30));
    *even = r * c;
    *odd = r * d;
}

/* a times the normal numbers of `blocks` blocks of 4. */
static void normals(float *out, float a, uint64_t seed, uint32_t tensor, uint64_t first, int blocks) {
    uint32_t w[4][(TILE + MARGIN) / 4];
    float z[4][(TILE + MARGIN) / 4];
    for (int b = 0; b < blocks; b++) {
        uint32_t v[4];
        philox(first + b, tensor, GAUSSIAN, seed, v);
        for (int j = 0; j < 4; j++) w[j][b] = v[j];
    }
    for (int pair = 0; pair < 4; pair += 2)
        for (int b = 0; b < blocks; b++) normal_pair(w[pair][b], w[pair + 1][b], &z[pair][b], &z[pair + 1][b]);
    for (int b = 0; b < blocks; b++)
        for (int j = 0; j < 4; j++) out[4 * b + j] = a * z[j][b];
}

/* a·u for elements start … start + m - 1 of a direction; they begin at the returned place within `tile`. */
static const float *term(float *tile, float a, int stream, uint64_t seed, uint32_t tensor, uint64_t start, int m) {
    const int per_block = stream == RADEMACHER ? 128 : 4;
    const int skip = (int)(start % per_block), blocks = (skip + m + per_block - 1) / per_block;
    (stream == RADEMACHER ? signs : normals)(tile, a, seed, tensor, start / per_block, blocks);
    return tile + skip;
}

static inline uint16_t nearest_bfloat16(float y) {
    uint32_t bits = bits_of(y);
    return (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

static inline uint16_t stochastic_bfloat16(float y, uint32_t random) {
    uint32_t bits = bits_of(y) & 0x7FFFFFFFu, lower = bits >> 16, up = ((bits & 0xFFFFu) + random) >> 16;
    up = lower + up < 0x7F80u ? up : 0;
    return (uint16_t)((lower + up) | ((bits_of(y) >> 16) & 0x8000u));
}

static inline uint16_t stochastic_float16(float y, uint32_t random) {
    float magnitude = fabsf(y);
    uint16_t nearest = half_of(magnitude);
    uint16_t lower = half_to_float(nearest) > magnitude ? (uint16_t)(nearest - 1) : nearest;
    float below = half_to_float(lower), gap = half_to_float((uint16_t)(lower + 1)) - below;
    uint32_t k = lower >= 0x7BFFu ? 0 : (uint32_t)((magnitude - below) / gap * 65536.0f), up = (k + random) >> 16;
    return (uint16_t)((lower + up) | ((bits_of(y) >> 16) & 0x8000u));
}

static void round_tile(uint16_t *out, const float *y, int kind, uint64_t seed, uint32_t tensor, uint64_t start, int m) {
    uint32_t random[TILE + 8];
    const int skip = (int)(start % 8), blocks = (skip + m + 7) / 8;
    for (int b = 0; b < blocks; b++) {
        uint32_t w[4];
        philox(start / 8 + b, tensor, ROUNDING, seed, w);
        for (int j = 0; j < 4; j++) {
            random[8 * b + 2 * j] = w[j] & 0xFFFFu;
            random[8 * b + 2 * j + 1] = w[j] >> 16;
        }
    }
    if (kind == BFLOAT16)
        for (int k = 0; k < m; k++) out[k] = stochastic_bfloat16(y[k], random[skip + k]);
    else
        for (int k = 0; k < m; k++) out[k] = stochastic_float16(y[k], random[skip + k]);
}

static void write_tile(void *out, const void *x, const float *total, int kind, int64_t at, int m) {
    if (kind == FLOAT) {
        float *to = (float *)out + at;
        const float *of = (const float *)x + at;
        for (int k = 0; k < m; k++) to[k] = of[k] + total[k];
        return;
    }
    uint16_t *to = (uint16_t *)out + at;
    const uint16_t *of = (const uint16_t *)x + at;
    if (kind == BFLOAT16)
        for (int k = 0; k < m; k++) to[k] = nearest_bfloat16(float_of((uint32_t)of[k] << 16) + total[k]);
    else
        for (int k = 0; k < m; k++) to[k] = half_of(half_to_float(of[k]) + total[k]);
}

void zotune_fill(float *out, int stream, uint64_t seed, uint32_t tensor, uint64_t start, int64_t lo, int64_t hi) {
    float tile[TILE + MARGIN];
    for (int64_t t = lo; t < hi; t += TILE) {
        const int m = hi - t < TILE ? (int)(hi - t) : TILE;
        memcpy(out + t, term(tile, 1.0f, stream, seed, tensor, start + t, m), m * sizeof(float));
    }
}

static void add_double(double *out, const double *x, int stream, int q, const uint64_t *seeds, const double *scales,
                       uint32_t tensor, uint64_t start, int64_t lo, int64_t hi) {
    float tile[TILE + MARGIN];
    double total[TILE];
    for (int64_t t = lo; t < hi; t += TILE) {
        const int m = hi - t < TILE ? (int)(hi - t) : TILE;
        for (int i = 0; i < q; i++) {
            const float *u = term(tile, 1.0f, stream, seeds[i], tensor, start + t, m);
            for (int k = 0; k < m; k++) total[k] = i ? total[k] + scales[i] * u[k] : scales[i] * u[k];
        }
        for (int k = 0; k < m; k++) out[t + k] = x[t + k] + total[k];
    }
}

/* out[lo:hi] = x[lo:hi] + Σ scales[i] uᵢ, the sum taken first; 16-bit results by `rounding_seed` if `stochastic`. */
void zotune_add(void *out, const void *x, int kind, int stream, int q, const uint64_t *seeds, const double *scales,
                int stochastic, uint64_t rounding_seed, uint32_t tensor, uint64_t start, int64_t lo, int64_t hi) {
    if (kind == DOUBLE) {
        add_double(out, x, stream, q, seeds, scales, tensor, start, lo, hi);
        return;
    }
    float tile[TILE + MARGIN], total[TILE];
    for (int64_t t = lo; t < hi; t += TILE) {
        const int m = hi - t < TILE ? (int)(hi - t) : TILE;
        const float *sum = term(tile, (float)scales[0], stream, seeds[0], tensor, start + t, m);
        if (q > 1) {
            memcpy(total, sum, m * sizeof(float));
            for (int i = 1; i < q; i++) {
                const float *u = term(tile, (float)scales[i], stream, seeds[i], tensor, start + t, m);
                for (int k = 0; k < m; k++) total[k] += u[k];
            }
            sum = total;
        }
        if (!stochastic) {
            write_tile(out, x, sum, kind, t, m);
            continue;
        }
        const uint16_t *of = (const uint16_t *)x + t;
        if (kind == BFLOAT16)
            for (int k = 0; k < m; k++) total[k] = float_of((uint32_t)of[k] << 16) + sum[k];
        else
            for (int k = 0; k < m; k++) total[k] = half_to_float(of[k]) + sum[k];
        round_tile((uint16_t *)out + t, total, kind, rounding_seed, tensor, start + t, m);
    }
}

/* rows[i] += scale u, where rows[i] is row indices[i] of the whole tensor. */
void zotune_add_rows(char *rows, const int64_t *indices, int64_t count, int64_t width, int64_t row_bytes, int kind,
                     int stream, uint64_t seed, double scale, uint32_t tensor) {
    for (int64_t i = 0; i < count; i++) {
        void *row = rows + i * row_bytes;
        zotune_add(row, row, kind, stream, 1, &seed, &scale, 0, 0, tensor, (uint64_t)(indices[i] * width), 0, width);
    }
}

void zotune_round(uint16_t *out, const float *y, int kind, uint64_t rounding_seed, uint32_t tensor, uint64_t start,
                  int64_t lo, int64_t hi) {
    for (int64_t t = lo; t < hi; t += TILE) {
        const int m = hi - t < TILE ? (int)(hi - t) : TILE;
        round_tile(out + t, y + t, kind, rounding_seed, tensor, start + t, m);
    }
}

/* out[lo:hi] = 0 where the mask stream's word is below `threshold`. */
void zotune_mask(float *out, uint64_t threshold, uint64_t seed, uint32_t tensor, uint64_t start, int64_t lo,
                 int64_t hi) {
    uint32_t words[TILE + 8];
    for (int64_t t = lo; t < hi; t += TILE) {
        const int m = hi - t < TILE ? (int)(hi - t) : TILE;
        const int skip = (int)((start + t) % 4), blocks = (skip + m + 3) / 4;
        for (int b = 0; b < blocks; b++) philox((start + t) / 4 + b, tensor, MASK, seed, words + 4 * b);
        for (int k = 0; k < m; k++) out[t + k] = words[skip + k] < threshold ? 0.0f : out[t + k];
    }
}
