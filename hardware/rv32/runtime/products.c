#include "products.h"

/* A constant: what this model has no matrix in is not compiled. */
#define HAS(format) (FORMATS >> format & 1)

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

/* The sum of w[i] x[i] over n plain numbers, or over bytes and nibbles without their scale. */
static float dot(unsigned format, const byte *w, const float *x, int n) {
    float sum = 0.0f;
    switch (format) {
    case F32:
        if (!HAS(F32)) break;
        for (int i = 0; i < n; i++) sum += ((const float *)w)[i] * x[i];
        break;
    case F16:
        if (!HAS(F16)) break;
        for (int i = 0; i < n; i++) sum += from_half(((const half *)w)[i]) * x[i];
        break;
    case BF16:
        if (!HAS(BF16)) break;
        for (int i = 0; i < n; i++) sum += from_brain(((const half *)w)[i]) * x[i];
        break;
    case I8:
        if (!HAS(I8)) break;
        for (int i = 0; i < n; i++) sum += (float)((const signed char *)w)[i] * x[i];
        break;
    case U8:
        if (!HAS(U8)) break;
        for (int i = 0; i < n; i++) sum += (float)w[i] * x[i];
        break;
    case U4:
        if (!HAS(U4)) break;
        for (int i = 0; i < n / 2; i++) sum += (float)(w[i] & 15) * x[2 * i] + (float)(w[i] >> 4) * x[2 * i + 1];
        break;
    }
    return sum;
}

#define TERM(code, place) sum += (float)((int)(code) - zero) * x[place]

/* The sum of (code - zero) x over a group of n weights: a whole number of words, of 3-bit codes of three words. */
static float dot_codes(unsigned format, const word *w, const float *x, int n, int zero) {
    float sum = 0.0f;
    const float *end = x + n;
    switch (format) {
    case Q2:
        if (!HAS(Q2)) break;
        for (; x < end; x += 16, w++) {
            word c = *w;
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) TERM(c >> 2 * i & 3, i);
        }
        break;
    case Q3: /* 32 codes in three words; the codes 10 and 21 cross a border */
        if (!HAS(Q3)) break;
        for (; x < end; x += 32, w += 3) {
            word a = w[0], b = w[1], c = w[2];
#pragma GCC unroll 10
            for (int i = 0; i < 10; i++) TERM(a >> 3 * i & 7, i);
            TERM((a >> 30 | b << 2) & 7, 10);
#pragma GCC unroll 10
            for (int i = 0; i < 10; i++) TERM(b >> (3 * i + 1) & 7, 11 + i);
            TERM((b >> 31 | c << 1) & 7, 21);
#pragma GCC unroll 10
            for (int i = 0; i < 10; i++) TERM(c >> (3 * i + 2) & 7, 22 + i);
        }
        break;
    case Q4:
        if (!HAS(Q4)) break;
        for (; x < end; x += 8, w++) {
            word c = *w;
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) TERM(c >> 4 * i & 15, i);
        }
        break;
    case Q8:
        if (!HAS(Q8)) break;
        for (; x < end; x += 4, w++) {
            word c = *w;
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) TERM(c >> 8 * i & 255, i);
        }
        break;
    }
    return sum;
}

static float grid_row(const struct linear *l, int row, const float *x) {
    const byte *codes = weights + l->codes + (word)row * row_bytes(l->format, (word)l->columns);
    word step = row_bytes(l->format, (word)l->group), groups = (word)(l->columns / l->group), first = (word)row * groups;
    const half *scales = (const half *)(weights + l->scales) + first;
    /* A stored zero point is one less, as in GPTQ's files. */
    int middle = l->format == Q2 ? 2 : l->format == Q3 ? 4 : l->format == Q4 ? 8 : 128;
    const byte *zeros = l->zeros ? weights + l->zeros + first : 0;
    float sum = 0.0f;
    for (word g = 0; g < groups; g++, codes += step, x += l->group)
        sum += from_half(scales[g]) * dot_codes(l->format, (const word *)codes, x, l->group, zeros ? zeros[g] + 1 : middle);
    return sum;
}

void linear(const struct linear *l, const float *x, float *y, int add) {
    for (int r = 0; r < l->rank; r++) {
        word width = row_bytes(l->adapter_format, (word)l->columns);
        float along = dot(l->adapter_format, weights + l->a + (word)r * width, x, l->columns);
        low[r] = along * floats(l->rank_scales)[r];
    }
    for (int row = 0; row < l->rows; row++) {
        float sum = l->format >= Q2 ? grid_row(l, row, x)
                                    : dot(l->format, weights + l->codes + (word)row * row_bytes(l->format, (word)l->columns),
                                          x, l->columns);
        if (l->rank) {
            word width = row_bytes(l->adapter_format, (word)l->rank);
            sum += dot(l->adapter_format, weights + l->b + (word)row * width, low, l->rank);
        }
        if (l->bias) sum += floats(l->bias)[row];
        y[row] = add ? y[row] + sum : sum;
    }
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
        case F32: value = ((const float *)row)[i]; break;
        case F16: value = from_half(((const half *)row)[i]); break;
        case BF16: value = from_brain(((const half *)row)[i]); break;
        case U8: value = (float)row[i]; break;
        case U4: value = (float)(row[i / 2] >> (i & 1) * 4 & 15); break;
        }
        x[i] = value * scale + minimum;
#ifdef EMBEDDING_SCALE
        x[i] *= EMBEDDING_SCALE;
#endif
    }
}

int likeliest(const float *x) {
    float sum = 0.0f, best = 0.0f;
    int found = -1;
    for (int i = 0; i < HIDDEN; i++) sum += x[i];
    for (int token = 0; token < VOCABULARY; token++) {
        float logit = dot(HEAD.format, matrix_row(&HEAD, token), x, HIDDEN);
        if (HEAD.scales) logit = logit * half_at(HEAD.scales, token) + half_at(HEAD.minimum, token) * sum;
        if (found < 0 || logit > best) best = logit, found = token;
    }
    return found;
}
