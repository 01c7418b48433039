/* Products take four rows of a matrix at a time, which share what is read of x. */

#include "products.h"

/* A constant: what this model has no matrix in is not compiled. */
#define HAS(format) (FORMATS >> format & 1)
#define ROWS 4
#define TOGETHER 16 /* tokens whose logits are computed in one call */

static float low[RANK + !RANK]; /* between the two matrices of an adapter */

/* Bytes of a row of n numbers. */
static word row_bytes(unsigned format, word n) {
    switch (format) {
    case F32: return 4 * n;
    case F16: case BF16: return 2 * n;
    case Q2: return n / 4;
    case Q3: return n / 8 * 3;
    case U4: case Q4: return n / 2;
    default: return n;
    }
}

/* --- numbers one by one ------------------------------------------------------------------------------------------- */

INLINED float number(unsigned format, const byte *w, int i) {
    switch (format) {
    case F32: return ((const float *)w)[i];
    case F16: return from_half(((const half *)w)[i]);
    case BF16: return from_brain(((const half *)w)[i]);
    case I8: return (float)((const signed char *)w)[i];
    case U4: return (float)(w[i / 2] >> (i & 1) * 4 & 15);
    default: return (float)w[i];
    }
}

/* Add to y[0], y[1] ... the sums of the rows that there are: four, or fewer at a matrix's end. */
INLINED void add_sums(const float *sum, int left, float *y) {
    if (left >= ROWS)
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) y[r] += sum[r];
    else
        for (int r = 0; r < left; r++) y[r] += sum[r];
}

INLINED void plain_rows(unsigned format, const byte *w, int rows, const float *x, int columns, float *y) {
    word stride = row_bytes(format, (word)columns);
    for (int left = rows; left > 0; left -= ROWS, w += ROWS * stride, y += ROWS) {
        /* Rows that are missing at the end are read as the first one. */
        const byte *row[ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) row[r] = w + (r < left ? (word)r * stride : 0);
        const float *v = x;
        float sum[ROWS] = {0.0f};
        int n = columns;
        for (; n >= 4; n -= 4, v += 4)
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) sum[r] = fused(number(format, row[r], i), v[i], sum[r]);
                row[r] += row_bytes(format, 4);
            }
#pragma GCC unroll 1
        for (int i = 0; i < n; i++)
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) sum[r] = fused(number(format, row[r], i), v[i], sum[r]);
        add_sums(sum, left, y);
    }
}

/* y += W x for plain numbers, or for bytes and nibbles without their scale. */
static __attribute__((noinline)) void plain(unsigned format, const byte *w, int rows, const float *x, int columns, float *y) {
    switch (format) {
#define CASE(format) case format: if (HAS(format)) plain_rows(format, w, rows, x, columns, y); break
    CASE(F32);
    CASE(F16);
    CASE(BF16);
    CASE(I8);
    CASE(U8);
    CASE(U4);
#undef CASE
    }
}

/* --- codes of a grid ---------------------------------------------------------------------------------------------- */

#if GROUPS /* there are any */

/* A code is not moved to the lower end of its word: x is divided by what it stands too high instead, which is a power
 * of two and costs no digit. So a weight takes three instructions: mask, convert, multiply and add. */
static float sums[GROUPS]; /* of x in each group of columns, negated */
#if PACKED_COLUMNS
static float shifted[PACKED_COLUMNS]; /* x, so divided */
#else
#define shifted x
#endif

/* Fill `sums` and, for codes that share words, `shifted`. */
static __attribute__((noinline)) void shift(const struct linear *l, const float *x) {
    float *to = sums;
    for (const float *last = x + l->columns; x < last; to++) {
        float sum = 0.0f;
        for (const float *end = x + l->group; x < end; x++) sum -= *x;
        *to = sum;
    }
#if PACKED_COLUMNS
    /* Where a column's code begins in its word; those of 3 bits that cross the border of two words are moved together. */
    int unit = l->format == Q2 ? 16 : l->format == Q3 ? 32 : 8, bits = l->format == Q2 ? 2 : l->format == Q3 ? 3 : 4;
    x -= l->columns;
    if (l->format != Q8)
        for (int place = 0; place < unit; place++) {
            int bit = place * bits & 31;
            float factor = from_bits((word)(127 - (bit + bits > 32 ? 0 : bit)) << 23);
            for (int i = place; i < l->columns; i += unit) shifted[i] = x[i] * factor;
        }
#endif
}

/* The sum of code x over the codes of a word from bit `first` on, `count` of them, each `bits` wide. */
#define WORD(codes, bits, first, count, place)                                                                         \
    for (int i = 0; i < count; i++)                                                                                    \
        sum = fused((float)((codes) & ((1u << bits) - 1) << (bits * i + first)), x[place + i], sum)

/* sum + the sum of code x over a unit: the least whole number of words that holds a whole number of codes. */
INLINED float unit_of(unsigned format, const word *w, const float *x, float sum) {
    if (format == Q8) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) sum = fused((float)((const byte *)w)[i], x[i], sum);
    } else if (format == Q4) {
        word a = w[0];
#pragma GCC unroll 8
        WORD(a, 4, 0, 8, 0);
    } else if (format == Q2) {
        word a = w[0];
#pragma GCC unroll 16
        WORD(a, 2, 0, 16, 0);
    } else { /* 32 codes in three words; the codes 10 and 21 cross a border */
        word a = w[0], b = w[1], c = w[2];
#pragma GCC unroll 10
        WORD(a, 3, 0, 10, 0);
        sum = fused((float)((a >> 30 | b << 2) & 7), x[10], sum);
#pragma GCC unroll 10
        WORD(b, 3, 1, 10, 11);
        sum = fused((float)((b >> 31 | c << 1) & 7), x[21], sum);
#pragma GCC unroll 10
        WORD(c, 3, 2, 10, 22);
    }
    return sum;
}

static const byte MIDDLES[] = {1, 3, 7, 127}; /* of Q2 to Q8, as a zero point is stored: one less */

INLINED void grid_rows(unsigned format, const struct linear *l, const float *x, float *y) {
    const int columns = format == Q2 ? 16 : format == Q3 ? 32 : format == Q4 ? 8 : 4, words = format == Q3 ? 3 : 1;
    int group = l->group;
    word stride = row_bytes(format, (word)l->columns), groups = (word)(l->columns / group), step = l->zeros ? 1 : 0;
    const byte *codes = weights + l->codes, *points = step ? weights + l->zeros : &MIDDLES[format - Q2];
    const half *factors = (const half *)(weights + l->scales);
    word codes_at[ROWS], groups_at[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) codes_at[r] = (word)r * stride, groups_at[r] = (word)r * groups;
    for (int left = l->rows; left > 0; left -= ROWS, y += ROWS) {
        if (left < ROWS) /* rows that are missing at the end are read as the first one */
#pragma GCC unroll 4
            for (int r = 1; r < ROWS; r++)
                if (r >= left) codes_at[r] = 0, groups_at[r] = 0;
        const byte *w[ROWS], *zeros[ROWS];
        const half *scales[ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
            w[r] = codes + codes_at[r];
            scales[r] = factors + groups_at[r];
            zeros[r] = points + (groups_at[r] & -step);
        }
        codes += ROWS * stride;
        factors += ROWS * groups;
        points += ROWS * groups & -step;
        const float *v = x;
        float all[ROWS] = {0.0f};
        for (const float *less = sums; less < sums + groups; less++) {
            /* A code less its zero point: less the one that is stored, and less one, with which the sum begins. */
            float sum[ROWS] = {*less, *less, *less, *less};
            for (const float *end = v + group; v < end; v += columns)
#pragma GCC unroll 4
                for (int r = 0; r < ROWS; r++) {
                    sum[r] = unit_of(format, (const word *)w[r], v, sum[r]);
                    w[r] += 4 * words;
                }
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) {
                sum[r] = fused((float)*zeros[r], *less, sum[r]);
                all[r] = fused(from_half(*scales[r]++), sum[r], all[r]);
                zeros[r] += step;
            }
        }
        add_sums(all, left, y);
    }
}

/* y += W x, after `shift`. */
static __attribute__((noinline)) void grid(const struct linear *l, const float *x, float *y) {
    switch (l->format) {
#define CASE(format, x) case format: if (HAS(format)) grid_rows(format, l, x, y); break
    CASE(Q2, shifted);
    CASE(Q3, shifted);
    CASE(Q4, shifted);
    CASE(Q8, x);
#undef CASE
    }
}
#endif

/* --- layers ------------------------------------------------------------------------------------------------------- */

void linear(const struct linear *l, const float *x, float *y, int add) {
    if (!add)
        for (int row = 0; row < l->rows; row++) y[row] = 0.0f;
    if (l->bias)
        for (int row = 0; row < l->rows; row++) y[row] += floats(l->bias)[row];
    if (l->rank) {
        for (int r = 0; r < l->rank; r++) low[r] = 0.0f;
        plain(l->adapter_format, weights + l->a, l->rank, x, l->columns, low);
        for (int r = 0; r < l->rank; r++) low[r] *= floats(l->rank_scales)[r];
        plain(l->adapter_format, weights + l->b, l->rows, low, l->rank, y);
    }
#if GROUPS
    if (l->format >= Q2) {
        shift(l, x);
        grid(l, x, y);
        return;
    }
#endif
    plain(l->format, weights + l->codes, l->rows, x, l->columns, y);
}

static const byte *matrix_row(const struct matrix *m, int row) {
    return weights + m->codes + (word)row * row_bytes(m->format, HIDDEN);
}

static float half_at(unsigned offset, int place) { return from_half(((const half *)(weights + offset))[place]); }

void embed(int token, float *x) {
    const byte *row = matrix_row(&EMBEDDING, token);
    float scale = EMBEDDING.scales ? half_at(EMBEDDING.scales, token) : 1.0f;
    float minimum = EMBEDDING.minimum ? half_at(EMBEDDING.minimum, token) : 0.0f;
    for (int i = 0; i < HIDDEN; i++) {
        float value = 0.0f;
        switch (EMBEDDING.format) {
#define CASE(format) case format: if (HAS(format)) value = number(format, row, i); break
        CASE(F32);
        CASE(F16);
        CASE(BF16);
        CASE(U8);
        CASE(U4);
#undef CASE
        }
        x[i] = fused(value, scale, minimum);
#ifdef EMBEDDING_SCALE
        x[i] *= EMBEDDING_SCALE;
#endif
    }
}

#ifdef EVERY_LOGIT /* who asks for them has them defined */
extern float logits[VOCABULARY];
#endif

int likeliest(const float *x) {
    float sum = 0.0f, best = 0.0f;
    int found = -1;
    for (int i = 0; i < HIDDEN; i++) sum += x[i];
    for (int first = 0; first < VOCABULARY; first += TOGETHER) {
        int count = VOCABULARY - first < TOGETHER ? VOCABULARY - first : TOGETHER;
        float some[TOGETHER] = {0.0f};
        plain(HEAD.format, matrix_row(&HEAD, first), count, x, HIDDEN, some);
        for (int r = 0, token = first; r < count; r++, token++) {
            float logit = some[r];
            if (HEAD.scales) logit = fused(logit, half_at(HEAD.scales, token), half_at(HEAD.minimum, token) * sum);
#ifdef EVERY_LOGIT
            logits[token] = logit;
#endif
            if (found < 0 || logit > best) best = logit, found = token;
        }
    }
    return found;
}
