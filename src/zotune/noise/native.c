/* The noise of spec.py in C, bit for bit.
 *
 * hatch_build.py compiles this file when the package is built, once for each width of vectors, without fused
 * multiply-add and without any of the liberties of fast-math: the specification fixes every operation and its order. Work is done in tiles that
 * stay in the first-level cache, shared among threads; a tile begins at a multiple of TILE elements of the
 * whole tensor, so that no block of noise lies in two and the bits do not depend on who makes them. Loops
 * hold no branch on the data; where `out` may be `x`, "ivdep" says that they meet at equal places only. */
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

enum { RADEMACHER = 1, GAUSSIAN = 2, ROUNDING = 3, MASK = 4, PROBE = 5 };
enum { FLOAT = 0, BFLOAT16 = 1, FLOAT16 = 2, DOUBLE = 3 };
enum { LANES = 16, TILE = 2048 };
#define ALIGNED __attribute__((aligned(64)))

static const int BYTES[] = {4, 2, 2, 8};

static inline int is_half(int kind) { return kind == BFLOAT16 || kind == FLOAT16; }

static inline uint32_t bits_of(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
static inline float float_of(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }

/* ---- tiles ---- */

/* What a tile covers of the `size` elements that begin with element `start` of the whole tensor. */
typedef struct {
    uint64_t base; /* the tile's first element */
    int from, count; /* the place in the tile of the first one that is wanted, and how many there are */
    int64_t at; /* where that one is among the `size` */
} tile_range;

static inline int64_t num_tiles(uint64_t start, int64_t size) {
    return size > 0 ? (int64_t)((start + size - 1) / TILE - start / TILE + 1) : 0;
}

static inline tile_range tile_at(int64_t index, uint64_t start, int64_t size) {
    tile_range t;
    t.base = (start / TILE + index) * TILE;
    t.from = index ? 0 : (int)(start - t.base);
    t.at = (int64_t)(t.base + t.from - start);
    t.count = size - t.at < TILE - t.from ? (int)(size - t.at) : TILE - t.from;
    return t;
}

#ifdef _OPENMP
#define FOR_EACH_TILE(t, start, size, threads) \
    _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)") \
    for (int64_t t = 0; t < num_tiles(start, size); t++)
#else
#define FOR_EACH_TILE(t, start, size, threads) for (int64_t t = 0; t < num_tiles(start, size); t++)
#endif

/* Ask for what the next tile is to read, while this one is being computed. */
static inline void prefetch_after(const char *x, int kind, tile_range t) {
    const char *next = x + (t.at + t.count) * BYTES[kind];
    for (int k = 0; k < TILE * BYTES[kind]; k += 64) __builtin_prefetch(next + k, 0, 2);
}

/* ---- words ---- */

/* A few counters at a time, each in the low half of 64 bits, where a multiplication leaves both of its halves;
 * what is above the low half is never looked at. */
#if defined(__AVX512F__)
typedef __m512i wide;
#define WIDE_SET(x) _mm512_set1_epi64((long long)(x))
#define WIDE_ADD(a, b) _mm512_add_epi64(a, b)
#define WIDE_XOR(a, b) _mm512_xor_si512(a, b)
#define WIDE_MUL(a, b) _mm512_mul_epu32(a, b)
#define WIDE_HIGH(a) _mm512_shuffle_epi32(a, _MM_PERM_DDBB)
#define WIDE_JOIN(low, high) _mm512_mask_shuffle_epi32(low, 0xAAAA, high, _MM_PERM_CCAA)
#elif defined(__AVX2__)
typedef __m256i wide;
#define WIDE_SET(x) _mm256_set1_epi64x((long long)(x))
#define WIDE_ADD(a, b) _mm256_add_epi64(a, b)
#define WIDE_XOR(a, b) _mm256_xor_si256(a, b)
#define WIDE_MUL(a, b) _mm256_mul_epu32(a, b)
#define WIDE_HIGH(a) _mm256_srli_epi64(a, 32)
#define WIDE_JOIN(low, high) _mm256_blend_epi32(low, _mm256_slli_epi64(high, 32), 0xAA)
#else
typedef uint64_t wide;
#define WIDE_SET(x) ((uint64_t)(x))
#define WIDE_ADD(a, b) ((a) + (b))
#define WIDE_XOR(a, b) ((a) ^ (b))
#define WIDE_MUL(a, b) ((uint64_t)(uint32_t)(a) * (uint32_t)(b))
#define WIDE_HIGH(a) ((a) >> 32)
#define WIDE_JOIN(low, high) ((uint64_t)(uint32_t)(low) | (high) << 32)
#endif
enum { WIDTH = sizeof(wide) / 8 };

/* The lanes of a and b in turn: a₀, b₀, a₁, b₁, … */
static inline void store_alternating(uint32_t *out, wide a, wide b) {
#if defined(__AVX512F__)
    const wide low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), high = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
    _mm512_storeu_si512(out, _mm512_permutex2var_epi64(a, low, b));
    _mm512_storeu_si512(out + 16, _mm512_permutex2var_epi64(a, high, b));
#elif defined(__AVX2__)
    const wide low = _mm256_unpacklo_epi64(a, b), high = _mm256_unpackhi_epi64(a, b);
    _mm256_storeu_si256((wide *)out, _mm256_permute2x128_si256(low, high, 0x20));
    _mm256_storeu_si256((wide *)(out + 8), _mm256_permute2x128_si256(low, high, 0x31));
#else
    memcpy(out, &a, sizeof a);
    memcpy(out + 2, &b, sizeof b);
#endif
}

/* The four words of a group of WIDTH blocks: word j of block first + l in the low half of lane l of c[j]. `first` is a
 * multiple of WIDTH, so that the blocks have one upper half. */
static inline void philox_group(wide c[4], uint64_t first, uint64_t tensor, uint32_t stream, uint64_t seed) {
    uint64_t number[WIDTH];
    for (int l = 0; l < WIDTH; l++) number[l] = l;
    wide lane;
    memcpy(&lane, number, sizeof lane);
    const wide block = WIDE_ADD(WIDE_SET(first), lane);
    wide c0 = block, c1 = WIDE_SET(tensor >> 32), c2 = WIDE_SET((uint32_t)tensor);
    wide c3 = WIDE_SET(stream + ((uint32_t)(first >> 32) << 8));
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        const wide p0 = WIDE_MUL(c0, WIDE_SET(0xD2511F53u)), p1 = WIDE_MUL(c2, WIDE_SET(0xCD9E8D57u));
        c0 = WIDE_XOR(WIDE_XOR(WIDE_HIGH(p1), c1), WIDE_SET(k0));
        c2 = WIDE_XOR(WIDE_XOR(WIDE_HIGH(p0), c3), WIDE_SET(k1));
        c1 = p1;
        c3 = p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    c[0] = c0, c[1] = c1, c[2] = c2, c[3] = c3;
}

/* w[j][l] = word j of block first + l. */
static inline void philox(uint64_t first, uint64_t tensor, uint32_t stream, uint64_t seed, uint32_t w[4][LANES]) {
    for (int part = 0; part < LANES; part += WIDTH) {
        wide c[4];
        uint64_t word[WIDTH];
        philox_group(c, first + part, tensor, stream, seed);
        for (int j = 0; j < 4; j++) {
            memcpy(word, &c[j], sizeof word);
            for (int l = 0; l < WIDTH; l++) w[j][part + l] = (uint32_t)word[l];
        }
    }
}

/* words[4 b + j] = word j of block first + b, for b from lo to hi, in whole groups of LANES. */
static inline void words_in_order(uint32_t *words, uint64_t first, int lo, int hi, uint64_t tensor, uint32_t stream,
                                  uint64_t seed) {
    for (int b = lo / LANES * LANES; b < hi; b += WIDTH) {
        wide c[4];
        philox_group(c, first + b, tensor, stream, seed);
        store_alternating(words + 4 * b, WIDE_JOIN(c[0], c[1]), WIDE_JOIN(c[2], c[3]));
    }
}

/* ---- directions ---- */

/* a times the signs of a whole tile. */
static inline void signs(float *out, float a, uint64_t seed, uint64_t tensor, uint64_t base) {
    const uint32_t positive = bits_of(a);
    uint32_t w[4][LANES];
    philox(base / 128, tensor, RADEMACHER, seed, w);
    for (int b = 0; b < LANES; b++)
        for (int j = 0; j < 4; j++)
            for (int k = 0; k < 32; k++) out[128 * b + 32 * j + k] = float_of(positive ^ ((w[j][b] >> k) << 31));
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

/* a times the normal numbers of a tile's places lo … hi - 1, in whole groups of 4 LANES. */
static inline void normals(float *out, float a, uint64_t seed, uint64_t tensor, uint64_t base, int lo, int hi) {
    for (int b = lo / (4 * LANES) * LANES; 4 * b < hi; b += LANES) {
        uint32_t w[4][LANES];
        float z[4][LANES];
        philox(base / 4 + b, tensor, GAUSSIAN, seed, w);
        for (int pair = 0; pair < 4; pair += 2)
            for (int l = 0; l < LANES; l++) normal_pair(w[pair][l], w[pair + 1][l], &z[pair][l], &z[pair + 1][l]);
        for (int l = 0; l < LANES; l++)
            for (int j = 0; j < 4; j++) out[4 * (b + l) + j] = a * z[j][l];
    }
}

/* a·u for a tile; the first of the elements that are wanted. `room` holds a whole tile. */
static inline const float *term(float *room, float a, int stream, uint64_t seed, uint64_t tensor, tile_range t) {
    if (stream == RADEMACHER)
        signs(room, a, seed, tensor, t.base);
    else
        normals(room, a, seed, tensor, t.base, t.from, t.from + t.count);
    return room + t.from;
}

/* The terms of a sum: directions by their seeds, or, of some rank, matrices by their factors. */
typedef struct {
    int count;
    uint64_t tensor;
    int stream; /* directions */
    const uint64_t *seeds;
    int rank; /* matrices; 0 for directions */
    const float *const *left; /* (rows, rank), from the row on in which the first element lies */
    const float *const *right; /* (rank, columns) */
    int64_t columns;
} terms;

/* a times a tile of the n-th matrix, 0 + a·u, whose first element lies in the row `left` begins with. */
static inline const float *product(float *room, float a, const terms *all, int n, uint64_t start, tile_range t) {
    const uint64_t columns = (uint64_t)all->columns, first = t.base + t.from;
    const float *left = all->left[n] + (first / columns - start / columns) * all->rank;
    int64_t column = (int64_t)(first % columns);
    float *to = room + t.from;
    for (int done = 0; done < t.count; left += all->rank, column = 0) {
        const int64_t more = all->columns - column;
        const int count = more < t.count - done ? (int)more : t.count - done;
        for (int s = 0; s < all->rank; s++) {
            const float *right = all->right[n] + s * all->columns + column;
            float *here = to + done;
            const float l = left[s];
            if (all->rank == 1)
                for (int k = 0; k < count; k++) here[k] = 0.0f + a * (l * right[k]);
            else if (s == 0)
                for (int k = 0; k < count; k++) here[k] = l * right[k];
            else if (s < all->rank - 1)
                for (int k = 0; k < count; k++) here[k] += l * right[k];
            else
                for (int k = 0; k < count; k++) here[k] = 0.0f + a * (here[k] + l * right[k]);
        }
        done += count;
    }
    return to;
}

/* a times the n-th term for a tile of the elements that begin with `start`. */
static inline const float *nth(float *room, float a, const terms *all, int n, uint64_t start, tile_range t) {
    return all->rank ? product(room, a, all, n, start, t) : term(room, a, all->stream, all->seeds[n], all->tensor, t);
}

/* ---- precisions ---- */

static inline uint16_t nearest_bfloat16(float y) {
    uint32_t bits = bits_of(y);
    return (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

static inline uint16_t stochastic_bfloat16(float y, uint32_t random) {
    const uint32_t bits = bits_of(y);
    /* The largest finite number stays, and so do infinity and NaN. */
    const int stays = (bits & 0x7FFFFFFFu) + random >= 0x7F800000u;
    return (uint16_t)((stays ? bits : bits + random) >> 16);
}

/* Without a branch: of several conditions on one number the compiler would make jumps, and of jumps no vectors. */
static inline uint32_t choose(int condition, uint32_t yes, uint32_t no) {
    const uint32_t all = -(uint32_t)condition;
    return (yes & all) | (no & ~all);
}

/* In units of the gap at |y|, a power of two, its whole part tells the lower neighbour, the rest the chance to go up. */
static inline uint16_t stochastic_float16(float y, uint32_t random) {
    const uint32_t bits = bits_of(y) & 0x7FFFFFFFu, sign = (bits_of(y) >> 16) & 0x8000u;
    uint32_t exponent = bits >> 23;
    exponent = exponent < 113 ? 113 : exponent;
    exponent = exponent > 142 ? 142 : exponent;
    const uint32_t finite = choose(bits < 0x47800000u, bits, 0);
    const float scaled = float_of(finite) * float_of((264 - exponent) << 23);
    const int32_t whole = (int32_t)scaled;
    const int32_t chance = (int32_t)((scaled - (float)whole) * 65536.0f);
    uint32_t rounded = ((exponent - 113) << 10) + (uint32_t)whole + (((uint32_t)chance + random) >> 16);
    rounded = choose(bits < 0x477FE000u, rounded, 0x7BFFu); /* the largest finite number is not left */
    rounded = choose(bits < 0x7F800000u, rounded, 0x7C00u);
    rounded = choose(bits > 0x7F800000u, 0x7E00u | ((bits >> 13) & 0x3FFu), rounded);
    return (uint16_t)(rounded | sign);
}

/* The exponent moves to its new place; a subnormal number is an integer in units of 2⁻²⁴; NaN becomes a quiet one. */
static inline float float_of_float16(uint16_t x) {
    const uint32_t magnitude = x & 0x7FFFu, sign = (uint32_t)(x & 0x8000u) << 16;
    uint32_t bits = (magnitude << 13) + (112u << 23);
    bits = choose(magnitude < 0x0400u, bits_of((float)(int32_t)magnitude * 0x1p-24f), bits);
    bits = choose(magnitude >= 0x7C00u, 0x7F800000u | magnitude << 13, bits);
    bits = choose(magnitude > 0x7C00u, bits | 0x00400000u, bits);
    return float_of(bits | sign);
}

/* The nearest, ties to even. Below 2⁻¹⁴ it is a number of units of 2⁻²⁴, which adding 2²³ rounds to an integer. */
static inline uint16_t nearest_float16(float y) {
    const uint32_t bits = bits_of(y) & 0x7FFFFFFFu, sign = (bits_of(y) >> 16) & 0x8000u;
    const uint32_t least = choose(bits < 0x38800000u, bits, 0);
    uint32_t rounded = (bits - (112u << 23) + 0xFFFu + ((bits >> 13) & 1u)) >> 13;
    rounded = choose(bits < 0x38800000u, bits_of(float_of(least) * 0x1p24f + 0x1p23f) & 0x7FFFFFu, rounded);
    rounded = choose(bits >= 0x477FF000u, 0x7C00u, rounded);
    rounded = choose(bits > 0x7F800000u, 0x7E00u | ((bits >> 13) & 0x3FFu), rounded);
    return (uint16_t)(rounded | sign);
}

static inline void widen_float16(float *y, const uint16_t *x, int n) {
    int k = 0;
#if defined(__F16C__)
    for (; k + 8 <= n; k += 8) _mm256_storeu_ps(y + k, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(x + k))));
#endif
    for (; k < n; k++) y[k] = float_of_float16(x[k]);
}

static inline void narrow_float16(uint16_t *out, const float *y, int n) {
    int k = 0;
#if defined(__F16C__)
    for (; k + 8 <= n; k += 8)
        _mm_storeu_si128((__m128i *)(out + k), _mm256_cvtps_ph(_mm256_loadu_ps(y + k), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; k < n; k++) out[k] = nearest_float16(y[k]);
}

/* y = x in single precision. */
static inline void widen(float *y, const void *x, int kind, int n) {
    const uint16_t *half = x;
    if (kind == FLOAT)
        memcpy(y, x, n * sizeof(float));
    else if (kind == FLOAT16)
        widen_float16(y, half, n);
    else
        for (int k = 0; k < n; k++) y[k] = float_of((uint32_t)half[k] << 16);
}

/* out = y, rounded to nearest even. */
static inline void narrow(void *out, const float *y, int kind, int n) {
    uint16_t *half = out;
    if (kind == FLOAT)
        memcpy(out, y, n * sizeof(float));
    else if (kind == FLOAT16)
        narrow_float16(half, y, n);
    else
        for (int k = 0; k < n; k++) half[k] = nearest_bfloat16(y[k]);
}

/* A tile's random numbers of 16 bits of a stream, ROUNDING or PROBE; the first of those that are wanted. */
static inline const uint16_t *random16(uint16_t *room, int stream, uint64_t seed, uint64_t tensor, tile_range t) {
    if (stream == ROUNDING) {
        uint32_t words[TILE / 2] ALIGNED;
        words_in_order(words, t.base / 8, t.from / 8, (t.from + t.count + 7) / 8, tensor, ROUNDING, seed);
        memcpy(room, words, sizeof words);
        return room + t.from;
    }
    uint32_t w[4][LANES];
    philox(t.base / 128, tensor, PROBE, seed, w);
    for (int b = 0; b < LANES; b++)
        for (int j = 0; j < 4; j++) {
            const uint16_t low = (uint16_t)w[j][b], high = (uint16_t)(w[j][b] >> 16);
            uint16_t *to = room + 128 * b + 32 * j;
            for (int k = 0; k < 32; k++) to[k] = (uint16_t)(low * (uint16_t)k + high);
        }
    return room + t.from;
}

/* out = y in half precision, rounded by the random numbers r. Where all of some numbers are normal ones below the
 * largest, adding a random number to the 13 bits that go is all there is to do. */
static inline void narrow_float16_at_random(uint16_t *out, const float *y, const uint16_t *r, int n) {
    int k = 0;
#if defined(__AVX2__) && defined(__F16C__)
    const __m256i above = _mm256_set1_epi32(0x387FFFFF), below = _mm256_set1_epi32(0x477FE000);
    for (; k + 8 <= n; k += 8) {
        const __m256i bits = _mm256_loadu_si256((const __m256i *)(y + k));
        const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF));
        const __m256i usual = _mm256_and_si256(_mm256_cmpgt_epi32(magnitude, above), _mm256_cmpgt_epi32(below, magnitude));
        if (_mm256_movemask_epi8(usual) != -1) {
            for (int l = k; l < k + 8; l++) out[l] = stochastic_float16(y[l], r[l]);
            continue;
        }
        const __m256i random = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(r + k)));
        const __m256i moved = _mm256_add_epi32(bits, _mm256_srli_epi32(random, 3));
        _mm_storeu_si128((__m128i *)(out + k), _mm256_cvtps_ph(_mm256_castsi256_ps(moved), _MM_FROUND_TO_ZERO));
    }
#endif
    for (; k < n; k++) out[k] = stochastic_float16(y[k], r[k]);
}

/* out = y as 16-bit patterns, rounded by the random numbers r so that the mean is y. */
static inline void narrow_at_random(uint16_t *out, const float *y, int kind, const uint16_t *r, int n) {
    if (kind == BFLOAT16)
        for (int k = 0; k < n; k++) out[k] = stochastic_bfloat16(y[k], r[k]);
    else
        narrow_float16_at_random(out, y, r, n);
}

/* out = x + u as 16-bit patterns, rounded by the random numbers r; `room` holds n numbers. */
static inline void write_sum_at_random(void *out, const void *x, const float *u, int kind, const uint16_t *r, float *room,
                                       int n) {
    uint16_t *to = out;
    const uint16_t *of = x;
    if (kind == BFLOAT16) {
#pragma GCC ivdep
        for (int k = 0; k < n; k++) to[k] = stochastic_bfloat16(float_of((uint32_t)of[k] << 16) + u[k], r[k]);
    } else {
        widen_float16(room, of, n);
        for (int k = 0; k < n; k++) room[k] += u[k];
        narrow_float16_at_random(to, room, r, n);
    }
}

/* out = x + u, rounded to nearest even. */
static inline void write_sum(void *out, const void *x, const float *u, int kind, int n) {
    float y[TILE] ALIGNED;
    if (kind == FLOAT) {
        float *to = out;
        const float *of = x;
#pragma GCC ivdep
        for (int k = 0; k < n; k++) to[k] = of[k] + u[k];
    } else if (kind == BFLOAT16) {
        uint16_t *to = out;
        const uint16_t *of = x;
#pragma GCC ivdep
        for (int k = 0; k < n; k++) to[k] = nearest_bfloat16(float_of((uint32_t)of[k] << 16) + u[k]);
    } else {
        widen(y, x, kind, n);
        for (int k = 0; k < n; k++) y[k] += u[k];
        narrow(out, y, kind, n);
    }
}

/* ---- what is called from Python ---- */

/* out = elements start … start + size - 1 of a direction. */
void zotune_fill(float *out, int stream, uint64_t seed, uint64_t tensor, uint64_t start, int64_t size, int threads) {
    FOR_EACH_TILE(i, start, size, threads) {
        float room[TILE] ALIGNED;
        const tile_range t = tile_at(i, start, size);
        memcpy(out + t.at, term(room, 1.0f, stream, seed, tensor, t), t.count * sizeof(float));
    }
}

static void add_double(double *out, const double *x, const terms *all, const double *scales, uint64_t start,
                       int64_t size, int threads) {
    FOR_EACH_TILE(i, start, size, threads) {
        float room[TILE] ALIGNED;
        double total[TILE] ALIGNED;
        const tile_range t = tile_at(i, start, size);
        for (int n = 0; n < all->count; n++) {
            const float *u = nth(room, 1.0f, all, n, start, t);
            for (int k = 0; k < t.count; k++) total[k] = n ? total[k] + scales[n] * u[k] : scales[n] * u[k];
        }
#pragma GCC ivdep
        for (int k = 0; k < t.count; k++) out[t.at + k] = x[t.at + k] + total[k];
    }
}

static inline void add_terms(char *out, const char *x, int kind, const terms *all, const double *scales,
                             int rounding, uint64_t rounding_seed, uint64_t start, int64_t size, int threads) {
    if (kind == DOUBLE) {
        add_double((double *)out, (const double *)x, all, scales, start, size, threads);
        return;
    }
    FOR_EACH_TILE(i, start, size, threads) {
        float room[TILE] ALIGNED, total[TILE] ALIGNED;
        const tile_range t = tile_at(i, start, size);
        char *to = out + t.at * BYTES[kind];
        const char *of = x + t.at * BYTES[kind];
        prefetch_after(x, kind, t);
        const float *sum = nth(total, (float)scales[0], all, 0, start, t);
        float *more = total + t.from;
        for (int n = 1; n < all->count; n++) {
            const float *u = nth(room, (float)scales[n], all, n, start, t);
            for (int k = 0; k < t.count; k++) more[k] += u[k];
        }
        if (!rounding) {
            write_sum(to, of, sum, kind, t.count);
            continue;
        }
        uint16_t random[TILE] ALIGNED;
        const uint16_t *r = random16(random, rounding, rounding_seed, all->tensor, t);
        write_sum_at_random(to, of, sum, kind, r, room, t.count);
    }
}

/* out = x + Σ scales[i] uᵢ, the sum taken first; 16-bit results at random by a stream, `rounding`, unless it is 0. */
void zotune_add(char *out, const char *x, int kind, int stream, int q, const uint64_t *seeds, const double *scales,
                int rounding, uint64_t rounding_seed, uint64_t tensor, uint64_t start, int64_t size, int threads) {
    const terms all = {.count = q, .tensor = tensor, .stream = stream, .seeds = seeds};
    add_terms(out, x, kind, &all, scales, rounding, rounding_seed, start, size, threads);
}

/* The same in place for each of some whole tensors, on so many threads each. */
void zotune_foreach_axpy(int count, char *const *xs, const uint64_t *tensors, const int64_t *sizes, const int *threads,
                     int kind, int stream, int q, const uint64_t *seeds, const double *scales, int rounding,
                     uint64_t rounding_seed) {
    for (int i = 0; i < count; i++)
        zotune_add(xs[i], xs[i], kind, stream, q, seeds, scales, rounding, rounding_seed, tensors[i], 0, sizes[i],
                   threads[i]);
}

/* As zotune_add, where uᵢ is the product of left[i], whose first row is that of element `start`, and right[i]. */
void zotune_add_products(char *out, const char *x, int kind, int q, const float *const *left,
                         const float *const *right, int rank, int64_t columns, const double *scales, int rounding,
                         uint64_t rounding_seed, uint64_t tensor, uint64_t start, int64_t size, int threads) {
    const terms all = {.count = q, .tensor = tensor, .rank = rank, .left = left, .right = right, .columns = columns};
    add_terms(out, x, kind, &all, scales, rounding, rounding_seed, start, size, threads);
}

/* ---- steps with a state ---- */

enum { MOMENTUM = 0, ADAM = 1, ADAMM = 2, AMSGRAD = 3 };

typedef struct {
    float beta1, rest1, beta2, rest2; /* of the averages; rest = 1 - beta */
    float bias1, bias2, eps;
    float keep, rate; /* x becomes keep x - rate step */
} constants;

/* The state of n elements advances by g, which becomes the step. Each operation is rounded by itself, in the order of
 * zotune.transforms. `first`: there is no state yet. */
static inline void advance(float *g, float *m, float *v, float *largest, int rule, int first, constants k, int n) {
    if (rule == MOMENTUM) {
        if (!first)
            for (int i = 0; i < n; i++) g[i] = k.beta1 * m[i] + g[i];
        memcpy(m, g, n * sizeof(float));
        return;
    }
    float other[TILE] ALIGNED; /* what v is measured against: the one before, or the largest so far */
    float *mine = rule == AMSGRAD ? largest : other;
    if (first) {
        for (int i = 0; i < n; i++) m[i] = k.rest1 * g[i];
        for (int i = 0; i < n; i++) v[i] = k.rest2 * (g[i] * g[i]);
        if (rule == AMSGRAD) memcpy(largest, v, n * sizeof(float));
        else memset(other, 0, n * sizeof(float));
    } else {
        if (rule == ADAMM) memcpy(other, v, n * sizeof(float));
        for (int i = 0; i < n; i++) m[i] = k.beta1 * m[i] + k.rest1 * g[i];
        for (int i = 0; i < n; i++) v[i] = k.beta2 * v[i] + k.rest2 * (g[i] * g[i]);
    }
    if (rule == ADAM) {
        for (int i = 0; i < n; i++) g[i] = (m[i] / k.bias1) / (sqrtf(v[i] / k.bias2) + k.eps);
        return;
    }
    for (int i = 0; i < n; i++) mine[i] = v[i] > mine[i] ? v[i] : mine[i];
    for (int i = 0; i < n; i++) g[i] = m[i] / (sqrtf(mine[i]) + k.eps);
}

/* x = keep x - rate h(Σ scales[i] uᵢ), with the state of h; not at all where `writes` is 0, but the state advances.
 * `numbers` are the constants in their order. Not for double precision. */
void zotune_step(char *x, float *m, float *v, float *largest, int kind, int rule, int first, int writes,
                 const float *numbers, int stream, int q, const uint64_t *seeds, const double *scales, int rounding,
                 uint64_t rounding_seed, uint64_t tensor, uint64_t start, int64_t size, int threads) {
    constants k;
    memcpy(&k, numbers, sizeof k);
    FOR_EACH_TILE(i, start, size, threads) {
        float room[TILE] ALIGNED, g[TILE] ALIGNED;
        const tile_range t = tile_at(i, start, size);
        for (int n = 0; n < q; n++) {
            const float *u = term(room, (float)scales[n], stream, seeds[n], tensor, t);
            for (int j = 0; j < t.count; j++) g[j] = (n ? g[j] : 0.0f) + u[j];
        }
        advance(g, m + t.at, v ? v + t.at : 0, largest ? largest + t.at : 0, rule, first, k, t.count);
        if (!writes) continue;
        char *to = x + t.at * BYTES[kind];
        widen(room, to, kind, t.count);
        for (int j = 0; j < t.count; j++) room[j] = room[j] * k.keep - k.rate * g[j];
        if (!rounding) {
            narrow(to, room, kind, t.count);
            continue;
        }
        uint16_t random[TILE] ALIGNED;
        const uint16_t *r = random16(random, rounding, rounding_seed, tensor, t);
        narrow_at_random((uint16_t *)to, room, kind, r, t.count);
    }
}

/* ---- thin products ---- */

/* n numbers in single precision: where they are, if that is what they are, else in `room`. */
static inline const float *as_floats(float *room, const char *x, int kind, int n) {
    if (kind == FLOAT) return (const float *)x;
    widen(room, x, kind, n);
    return room;
}

/* Σ x_k right_k in single precision, in as many sums as an addition takes cycles. */
static inline float dot(const char *x, int kind, const float *right, int64_t n) {
    enum { SUMS = 4 * LANES };
    float room[TILE] ALIGNED, sums[SUMS] = {0}, total = 0;
    for (int64_t at = 0; at < n; at += TILE) {
        const int count = n - at < TILE ? (int)(n - at) : TILE;
        const float *of = as_floats(room, x + at * BYTES[kind], kind, count);
        int k = 0;
        for (; k + SUMS <= count; k += SUMS)
            for (int l = 0; l < SUMS; l++) sums[l] += of[k + l] * right[at + k + l];
        for (; k < count; k++) total += of[k] * right[at + k];
    }
    for (int l = 0; l < SUMS; l++) total += sums[l];
    return total;
}

/* How the results of a product are rounded: by the probe stream of a direction, element by element of its share of
 * `out`, unless `at_random` is 0. */
typedef struct {
    int at_random;
    uint64_t seed, tensor;
} product_rounding;

/* out += a x right_s left_s for each s < rank, where left is (rank, m) and right (rank, n), and bias (m) if there is
 * one: one row, number `row` of its share. */
static inline void low_rank_matmul_add_row(char *out, const char *x, int kind, int64_t row, int64_t m, int64_t n, int rank,
                                           const float *left, const float *right, float a, const float *bias,
                                           product_rounding rounding) {
    float room[TILE] ALIGNED, thin[rank];
    uint16_t random[TILE] ALIGNED;
    for (int s = 0; s < rank; s++) thin[s] = a * dot(x, kind, right + s * n, n);
    const uint64_t start = (uint64_t)(row * m);
    for (int64_t i = 0; i < num_tiles(start, m); i++) {
        const tile_range t = tile_at(i, start, m);
        char *to = out + t.at * BYTES[kind];
        float *y = (float *)as_floats(room, to, kind, t.count);
        if (bias)
            for (int k = 0; k < t.count; k++) y[k] += bias[t.at + k];
        for (int s = 0; s < rank; s++)
            for (int k = 0; k < t.count; k++) y[k] += thin[s] * left[s * m + t.at + k];
        if (kind == FLOAT) continue;
        if (!rounding.at_random)
            narrow(to, y, kind, t.count);
        else
            narrow_at_random((uint16_t *)to, y, kind, random16(random, PROBE, rounding.seed, rounding.tensor, t),
                             t.count);
    }
}

/* Each of equal shares of the rows of out (rows, m) plus that of x (rows, n) times its own matrix of low rank, and plus
 * its own of `biases` (shares, m), if there are any. Sums are no bits of the specification: a forward pass may sum in
 * any order. 16-bit results are rounded by the probe streams of `seeds`, one a share, if there are any. Not for double
 * precision. */
void zotune_low_rank_matmul_add(char *out, const char *x, int kind, int64_t rows, int64_t m, int64_t n, int shares, int rank,
                     const float *const *left, const float *const *right, const double *scales, const float *biases,
                     const uint64_t *seeds, uint64_t tensor, int threads) {
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
#endif
    for (int64_t i = 0; i < rows; i++) {
        const int64_t each = rows / shares, share = i / each;
        const product_rounding rounding = {seeds != 0, seeds ? seeds[share] : 0, tensor};
        low_rank_matmul_add_row(out + i * m * BYTES[kind], x + i * n * BYTES[kind], kind, i - share * each, m, n, rank,
                                left[share], right[share], (float)scales[share], biases ? biases + share * m : 0,
                                rounding);
    }
}

/* plus = x + scale u and minus = x - scale u, of one reading of x and one making of u; 16-bit results at random, both by
 * the same numbers of the probe stream. Not for double precision. */
void zotune_axpy_pair(char *plus, char *minus, const char *x, int kind, int stream, uint64_t seed, double scale,
                 uint64_t tensor, uint64_t start, int64_t size, int threads) {
    FOR_EACH_TILE(i, start, size, threads) {
        float room[TILE] ALIGNED, opposite[TILE] ALIGNED;
        const tile_range t = tile_at(i, start, size);
        const int64_t at = t.at * BYTES[kind];
        prefetch_after(x, kind, t);
        const float *u = term(room, (float)scale, stream, seed, tensor, t);
        for (int k = 0; k < t.count; k++) opposite[k] = -u[k];
        if (kind == FLOAT) {
            write_sum(plus + at, x + at, u, kind, t.count);
            write_sum(minus + at, x + at, opposite, kind, t.count);
            continue;
        }
        float y[TILE] ALIGNED;
        uint16_t random[TILE] ALIGNED;
        const uint16_t *r = random16(random, PROBE, seed, tensor, t);
        write_sum_at_random(plus + at, x + at, u, kind, r, y, t.count);
        write_sum_at_random(minus + at, x + at, opposite, kind, r, y, t.count);
    }
}

/* rows[i] += scale u, where rows[i] is row indices[i] of the whole tensor; 16-bit results by the probe stream. */
void zotune_add_rows(char *rows, const int64_t *indices, int64_t count, int64_t width, int64_t row_bytes, int kind,
                     int stream, uint64_t seed, double scale, uint64_t tensor) {
    for (int64_t i = 0; i < count; i++) {
        char *row = rows + i * row_bytes;
        const uint64_t start = (uint64_t)(indices[i] * width);
        zotune_add(row, row, kind, stream, 1, &seed, &scale, is_half(kind) ? PROBE : 0, seed, tensor, start, width, 1);
    }
}

/* out = y as 16-bit patterns, rounded at random by a stream so that the mean is y. */
void zotune_round(uint16_t *out, const float *y, int kind, int rounding, uint64_t rounding_seed, uint64_t tensor, uint64_t start,
                  int64_t size, int threads) {
    FOR_EACH_TILE(i, start, size, threads) {
        const tile_range t = tile_at(i, start, size);
        uint16_t random[TILE] ALIGNED;
        const uint16_t *r = random16(random, rounding, rounding_seed, tensor, t);
        narrow_at_random(out + t.at, y + t.at, kind, r, t.count);
    }
}

/* out = 0 where the mask stream's word is below `threshold`. */
void zotune_mask(float *out, uint64_t threshold, uint64_t seed, uint64_t tensor, uint64_t start, int64_t size,
                 int threads) {
    FOR_EACH_TILE(i, start, size, threads) {
        uint32_t words[TILE] ALIGNED;
        const tile_range t = tile_at(i, start, size);
        words_in_order(words, t.base / 4, t.from / 4, (t.from + t.count + 3) / 4, tensor, MASK, seed);
        for (int k = 0; k < t.count; k++) out[t.at + k] = words[t.from + k] < threshold ? 0.0f : out[t.at + k];
    }
}
