/* Products take four rows of a matrix at a time, which share what is read of x. */

#include "products.h"

/* A constant: what this model has no matrix in is not compiled. */
#define HAS(format) (FORMATS >> format & 1)
#define TOGETHER 32 /* tokens whose logits are computed in one call */

/* --- numbers one by one ------------------------------------------------------------------------------------------- */

static float low[RANK + !RANK]; /* between the two matrices of an adapter */

INLINED void plain_rows(unsigned format, const byte *w, int rows, const float *x, int columns, float *y, int add) {
    const int step = format == I8 ? 4 : 8; /* B of an adapter in bytes has few columns */
    word stride = row_bytes(format, (word)columns);
    for (int left = rows; left > 0; left -= ROWS, w += ROWS * stride, y += ROWS) {
        /* Rows that are missing at the end are read as the first one. */
        const byte *row[ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) row[r] = w + (r < left ? (word)r * stride : 0);
        const float *v = x;
        float sum[ROWS] = {0.0f};
        int n = columns;
        for (; n >= step; n -= step, v += step) {
#pragma GCC unroll 8
            for (int i = 0; i < step; i++) {
                float input = v[i];
#pragma GCC unroll 4
                for (int r = 0; r < ROWS; r++) sum[r] = fused(number(format, row[r], i), input, sum[r]);
            }
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) row[r] += row_bytes(format, (word)step);
        }
#pragma GCC unroll 1
        for (int i = 0; i < n; i++)
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) sum[r] = fused(number(format, row[r], i), v[i], sum[r]);
        put_sums(sum, left, y, add);
    }
}

/* y = W x, or y += W x, for plain numbers, or for bytes and nibbles without their scale. */
static __attribute__((noinline)) void plain(
    unsigned format, const byte *w, int rows, const float *x, int columns, float *y, int add
) {
    switch (format) {
#define CASE(format) case format: if (HAS(format)) plain_rows(format, w, rows, x, columns, y, add); break
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

#if INPUT_NUMBERS
float prepared[INPUT_NUMBERS];
#endif

#if GROUPS && INPUT_BITS == 32 /* there are any all of whose codes are stored, and inputs are not rounded */

#if INPUT_NUMBERS
#define PREPARED prepared
#else
#define PREPARED x
#endif

/* A code is not moved to the lower end of its word: x is divided by what it stands too high instead, which is a power
 * of two and costs no digit. So a weight takes three instructions: mask, convert, multiply and add. */
static float sums[GROUPS]; /* of x in each group of columns, negated */

/* The least columns whose codes fill whole words. */
#define UNIT(bits) (bits == 2 ? 16 : bits == 3 ? 32 : bits == 4 ? 8 : 4)

/* Fill `sums` and, for codes that share words, `prepared`: with x, so divided. */
static __attribute__((noinline)) void shift(const struct linear *l, int bits, const float *x) {
    float *to = sums;
    for (const float *last = x + l->columns; x < last; to++) {
        float sum = 0.0f;
        for (const float *end = x + l->group; x < end; x++) sum -= *x;
        *to = sum;
    }
#if INPUT_NUMBERS
    /* Where a column's code begins in its word; those of 3 bits that cross the border of two words are moved together. */
    int unit = UNIT(bits);
    x -= l->columns;
    if (bits < 8)
        for (int place = 0; place < unit; place++) {
            int bit = place * bits & 31;
            float factor = from_bits((word)(127 - (bit + bits > 32 ? 0 : bit)) << 23);
            for (int i = place; i < l->columns; i += unit) prepared[i] = x[i] * factor;
        }
#else
    (void)bits;
#endif
}

/* The sum of code x over the codes of a word from bit `first` on, `count` of them, each `bits` wide. */
#define WORD(codes, bits, first, count, place)                                                                         \
    for (int i = 0; i < count; i++)                                                                                    \
        sum = fused((float)((codes) & ((1u << bits) - 1) << (bits * i + first)), x[place + i], sum)

/* sum + the sum of code x over a unit. */
INLINED float unit_of(int bits, const word *w, const float *x, float sum) {
    if (bits == 8) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) sum = fused((float)((const byte *)w)[i], x[i], sum);
    } else if (bits == 4) {
        word a = w[0];
#pragma GCC unroll 8
        WORD(a, 4, 0, 8, 0);
    } else if (bits == 2) {
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

/* Four rows lie side by side, group by group: their scales, their zero points less one, their codes unit by unit. */
INLINED void grid_rows(int bits, int zeros, const struct linear *l, const float *x, float *y, int add) {
    const int columns = UNIT(bits), words = columns * bits / 32;
    const float *last = x + l->columns;
    const word *w = (const word *)(weights + l->codes);
    for (int left = l->rows; left > 0; left -= ROWS, y += ROWS) {
        const float *v = x, *less = sums;
        float all[ROWS] = {0.0f};
        do {
            const half *scales = (const half *)w;
            const byte *points = (const byte *)(w + 2);
            /* A code less its zero point: a sum begins with what the zero point takes off. */
            float sum[ROWS], middle = *less * (float)(1 << (bits - 1));
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) sum[r] = zeros ? fused((float)points[r], *less, *less) : middle;
            w += zeros ? 3 : 2;
            for (const float *end = v + l->group; v < end; v += columns, w += ROWS * words) {
#pragma GCC unroll 4
                for (int r = 0; r < ROWS; r++) sum[r] = unit_of(bits, w + r * words, v, sum[r]);
                MOVED(v, w);
            }
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) all[r] = fused(from_half(scales[r]), sum[r], all[r]);
            less++;
        } while (v < last);
        put_sums(all, left, y, add);
    }
}

/* y = W x or y += W x. made: what is made of x before it is multiplied lies there. */
static __attribute__((noinline)) void grid(const struct linear *l, const float *x, float *y, int add, int made) {
    switch (l->format) {
#define CASE(name, bits, zeros)                                                                                        \
    case name:                                                                                                         \
        if (!made) shift(l, bits, x);                                                                                  \
        grid_rows(bits, zeros, l, bits < 8 ? PREPARED : x, y, add);                                                    \
        break;
    GRIDS(CASE)
#undef CASE
    }
}
#endif

/* --- layers ------------------------------------------------------------------------------------------------------- */

void linear(const struct linear *l, const float *x, float *y, int add, const struct linear *like) {
    if (l->bias) {
        for (int row = 0; row < l->rows; row++) y[row] = add ? y[row] + floats(l->bias)[row] : floats(l->bias)[row];
        add = 1;
    }
    if (l->rank) {
        plain(l->adapter_format, weights + l->a, l->rank, x, l->columns, low, 0);
        for (int r = 0; r < l->rank; r++) low[r] *= floats(l->rank_scales)[r];
        plain(l->adapter_format, weights + l->b, l->rows, low, l->rank, y, add);
        add = 1;
    }
#ifdef GRIDS
    if (l->format >= GRID) {
        int made = like && like->format == l->format && like->group == l->group;
#if NUMBERS_LISTED || LISTED && INPUT_BITS == 32
        if (list_linear(l, x, y, add, made)) return;
#endif
#if INPUT_BITS == 8
        integer_linear(l, x, y, add, made);
#elif GROUPS
        grid(l, x, y, add, made);
#endif
        return;
    }
#endif
    (void)like;
    plain(l->format, weights + l->codes, l->rows, x, l->columns, y, add);
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
    const half *scales = (const half *)(weights + HEAD.scales), *minimum = (const half *)(weights + HEAD.minimum);
    float best = -LARGEST;
    int found = 0, coded = HEAD.scales != 0;
#ifdef HEAD_BITS
    float sum = round_state(x);
#else
    float sum = 0.0f;
    for (int i = 0; i < HIDDEN; i++) sum += x[i];
#endif
    for (int first = 0; first < VOCABULARY; first += TOGETHER) {
        int count = VOCABULARY - first < TOGETHER ? VOCABULARY - first : TOGETHER;
        float some[TOGETHER];
#ifdef HEAD_BITS
        head_products(matrix_row(&HEAD, first), count, some);
#else
        plain(HEAD.format, matrix_row(&HEAD, first), count, x, HIDDEN, some, 0);
#endif
        for (int r = 0, token = first; r < count; r++, token++) {
            float logit = some[r];
            if (coded) logit = fused(logit, from_half(scales[token]), from_half(minimum[token]) * sum);
#ifdef EVERY_LOGIT
            logits[token] = logit;
#endif
            if (logit > best) best = logit, found = token;
        }
    }
    return found;
}
