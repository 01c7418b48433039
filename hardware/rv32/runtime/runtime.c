/* A LLaMA-like model, one token at a time, in float32. No heap, no libc: freestanding C for RV32IMF.
 *
 * Weights and tables are constant; the KV cache and the vectors below are all the memory that is written besides the
 * stack. Nothing is read before it was written, so nothing has to be cleared at the start. */

#include "model.h"

typedef unsigned int word;
typedef unsigned short half;
typedef unsigned char byte;

#define LARGER(a, b) ((a) > (b) ? (a) : (b))
#define QUERY (HEADS * HEAD_DIM)
#define KEY (KV_HEADS * HEAD_DIM)

static float cache[LAYERS][2][CONTEXT][KEY] __attribute__((section(".bss.kv")));
static struct {
    float x[HIDDEN];                      /* the token's state */
    float normed[LARGER(HIDDEN, QUERY)];  /* what a layer reads: the state after a norm, or attention's result */
    float query[QUERY];
    float gate[INTERMEDIATE], up[INTERMEDIATE];
    float scores[CONTEXT];
    float cosine[HEAD_DIM / 2], sine[HEAD_DIM / 2];
    float low[LARGER(RANK, 1)]; /* between the two matrices of an adapter */
} act;

/* --- numbers ------------------------------------------------------------------------------------------------------ */

static float from_bits(word bits) {
    union {
        word bits;
        float value;
    } u = {bits};
    return u.value;
}

static float from_half(word h) {
    /* The exponent's bias differs by 112: multiplying by 2^112 is right for subnormal halves too. */
    float magnitude = from_bits((h & 0x7fff) << 13) * 0x1p112f;
    return h & 0x8000 ? -magnitude : magnitude;
}

static float from_brain(word h) { return from_bits(h << 16); }

static float exponential(float x) {
    if (x < -87.0f) return 0.0f;
    if (x > 88.0f) x = 88.0f;
    int n = (int)(x * 1.44269504f + (x < 0.0f ? -0.5f : 0.5f));
    /* ln 2 in two parts, so that the difference keeps its digits; then Taylor's series for |r| <= ln 2 / 2. */
    float r = (x - (float)n * 0.693359375f) + (float)n * 2.12194440e-4f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * from_bits((word)(n + 127) << 23);
}

/* Of an angle from 0 to 12,000: less a multiple of pi / 2 in three parts, then Taylor's series for |r| <= pi / 4. */
static void turn(float angle, float *cosine, float *sine) {
    int quarter = (int)(angle * 0.636619772f + 0.5f);
    float k = (float)quarter;
    float r = ((angle - k * 1.5703125f) - k * 4.837512969970703e-4f) - k * 7.549789954891882e-8f;
    float rr = r * r;
    float s = r * (1.0f + rr * (-1.0f / 6 + rr * (1.0f / 120 + rr * (-1.0f / 5040 + rr * (1.0f / 362880)))));
    float c = 1.0f + rr * (-0.5f + rr * (1.0f / 24 + rr * (-1.0f / 720 + rr * (1.0f / 40320 - rr * (1.0f / 3628800)))));
    float swap = quarter & 1 ? s : c, other = quarter & 1 ? c : s;
    *cosine = (quarter + 1) & 2 ? -swap : swap;
    *sine = quarter & 2 ? -other : other;
}

/* --- products ----------------------------------------------------------------------------------------------------- */

static const float *floats(unsigned offset) { return (const float *)(weights + offset); }

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
        for (int i = 0; i < n; i++) sum += ((const float *)w)[i] * x[i];
        break;
    case F16:
        for (int i = 0; i < n; i++) sum += from_half(((const half *)w)[i]) * x[i];
        break;
    case BF16:
        for (int i = 0; i < n; i++) sum += from_brain(((const half *)w)[i]) * x[i];
        break;
    case I8:
        for (int i = 0; i < n; i++) sum += (float)((const signed char *)w)[i] * x[i];
        break;
    case U8:
        for (int i = 0; i < n; i++) sum += (float)w[i] * x[i];
        break;
    case U4:
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
        for (; x < end; x += 16, w++) {
            word c = *w;
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) TERM(c >> 2 * i & 3, i);
        }
        break;
    case Q3: /* 32 codes in three words; the codes 10 and 21 cross a border */
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
        for (; x < end; x += 8, w++) {
            word c = *w;
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) TERM(c >> 4 * i & 15, i);
        }
        break;
    case Q8:
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

/* y = W x + bias, or y += W x + bias; W is what is stored, and the adapter's B diag(scales) A. */
static void linear(const struct linear *l, const float *x, float *y, int add) {
    for (int r = 0; r < l->rank; r++) {
        word width = row_bytes(l->adapter_format, (word)l->columns);
        float along = dot(l->adapter_format, weights + l->a + (word)r * width, x, l->columns);
        act.low[r] = along * floats(l->rank_scales)[r];
    }
    for (int row = 0; row < l->rows; row++) {
        float sum = l->format >= Q2 ? grid_row(l, row, x)
                                    : dot(l->format, weights + l->codes + (word)row * row_bytes(l->format, (word)l->columns),
                                          x, l->columns);
        if (l->rank) {
            word width = row_bytes(l->adapter_format, (word)l->rank);
            sum += dot(l->adapter_format, weights + l->b + (word)row * width, act.low, l->rank);
        }
        if (l->bias) sum += floats(l->bias)[row];
        y[row] = add ? y[row] + sum : sum;
    }
}

static const byte *matrix_row(const struct matrix *m, int row) {
    return weights + m->codes + (word)row * row_bytes(m->format, HIDDEN);
}

static float half_at(unsigned offset, int place) { return from_half(((const half *)(weights + offset))[place]); }

static void embed(int token) {
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
        act.x[i] = value * scale + minimum;
    }
}

/* The first of the largest logits, without keeping them. */
static int likeliest(const float *x) {
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

/* --- a block ------------------------------------------------------------------------------------------------------ */

static void norm(const float *x, unsigned weight, float *y) {
    float sum = 0.0f;
    for (int i = 0; i < HIDDEN; i++) sum += x[i] * x[i];
    float factor = 1.0f / __builtin_sqrtf(sum / HIDDEN + EPSILON);
    for (int i = 0; i < HIDDEN; i++) y[i] = floats(weight)[i] * (x[i] * factor);
}

/* Turn the pairs (i, i + HEAD_DIM / 2) of each head by the position's angles. */
static void rotate(float *x, int heads) {
    for (int h = 0; h < heads; h++, x += HEAD_DIM)
        for (int i = 0; i < HEAD_DIM / 2; i++) {
            float a = x[i], b = x[i + HEAD_DIM / 2];
            x[i] = a * act.cosine[i] - b * act.sine[i];
            x[i + HEAD_DIM / 2] = b * act.cosine[i] + a * act.sine[i];
        }
}

static void attention(int layer, int position) {
    const float scale = 1.0f / __builtin_sqrtf((float)HEAD_DIM);
    for (int h = 0; h < HEADS; h++) {
        const float *q = act.query + h * HEAD_DIM;
        float *out = act.normed + h * HEAD_DIM;
        int own = h / (HEADS / KV_HEADS) * HEAD_DIM;
        float top = 0.0f, sum = 0.0f;
        for (int t = 0; t <= position; t++) {
            act.scores[t] = scale * dot(F32, (const byte *)(cache[layer][0][t] + own), q, HEAD_DIM);
            if (t == 0 || act.scores[t] > top) top = act.scores[t];
        }
        for (int i = 0; i < HEAD_DIM; i++) out[i] = 0.0f;
        for (int t = 0; t <= position; t++) {
            float share = exponential(act.scores[t] - top);
            const float *v = cache[layer][1][t] + own;
            sum += share;
            for (int i = 0; i < HEAD_DIM; i++) out[i] += share * v[i];
        }
        for (int i = 0; i < HEAD_DIM; i++) out[i] /= sum;
    }
}

int forward(int token, int position, int want_next) {
    embed(token);
    for (int i = 0; i < HEAD_DIM / 2; i++) turn((float)position * FREQUENCIES[i], &act.cosine[i], &act.sine[i]);
    for (int layer = 0; layer < LAYERS; layer++) {
        const struct linear *l = LINEARS[layer];
        float *key = cache[layer][0][position], *value = cache[layer][1][position];
        norm(act.x, NORMS[layer][0], act.normed);
        linear(&l[0], act.normed, act.query, 0);
        linear(&l[1], act.normed, key, 0);
        linear(&l[2], act.normed, value, 0);
        rotate(act.query, HEADS);
        rotate(key, KV_HEADS);
        attention(layer, position);
        linear(&l[3], act.normed, act.x, 1);
        norm(act.x, NORMS[layer][1], act.normed);
        linear(&l[4], act.normed, act.gate, 0);
        linear(&l[5], act.normed, act.up, 0);
        for (int i = 0; i < l[4].rows; i++) {
            float g = act.gate[i];
            act.gate[i] = g / (1.0f + exponential(-g)) * act.up[i];
        }
        linear(&l[6], act.gate, act.x, 1);
    }
    if (!want_next) return 0;
    norm(act.x, FINAL_NORM, act.normed);
    return likeliest(act.normed);
}
