/* A LLaMA-like model, one token at a time, in float32. No heap, no libc: freestanding C for RV32IMF.
 *
 * What differs between families are macros and tables of model.h: a model has no code for the parts of others.
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

static float cache[2][ALL_ROOM][KEY] __attribute__((section(".bss.kv"))); /* keys, values */
static struct {
    float x[HIDDEN];                      /* the token's state */
    float normed[LARGER(HIDDEN, QUERY)];  /* what a layer reads: the state after a norm, or attention's result */
    float query[BRANCH ? LARGER(HIDDEN, QUERY) : QUERY]; /* with BRANCH also what a branch adds to the state */
#if GATED
    float gate[INTERMEDIATE];
#endif
    float up[INTERMEDIATE];
    float scores[MOST_ROOM];
    float cosine[ROPES][ROTARY / 2], sine[ROPES][ROTARY / 2];
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

#ifdef ATTENTION_CAP
static float hyperbolic_tangent(float x) {
    float xx = x * x;
    if (xx < 0.0625f) /* Taylor's series: the difference below would cancel */
        return x * (1.0f + xx * (-1.0f / 3 + xx * (2.0f / 15 + xx * (-17.0f / 315 + xx * (62.0f / 2835)))));
    return 1.0f - 2.0f / (1.0f + exponential(2.0f * x));
}
#endif

static float activated(float x) {
    switch (ACTIVATION) {
    case ACT_SILU: return x / (1.0f + exponential(-x));
    case ACT_GELU: {
        /* The error function by a polynomial (Abramowitz and Stegun 7.1.26), to 1.5e-7. */
        float z = (x < 0.0f ? -x : x) * 0.707106781f;
        float t = 1.0f / (1.0f + 0.3275911f * z);
        float p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
        float tail = 0.5f * p * exponential(-z * z); /* of the normal distribution, beyond |x| */
        return x * (x < 0.0f ? tail : 1.0f - tail);
    }
    case ACT_GELU_PYTORCH_TANH: return x / (1.0f + exponential(-1.59576912f * (x + 0.044715f * x * x * x)));
    case ACT_RELU: return x > 0.0f ? x : 0.0f;
    default: return x > 0.0f ? x * x : 0.0f;
    }
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
#ifdef EMBEDDING_SCALE
        act.x[i] *= EMBEDDING_SCALE;
#endif
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

/* y = x over its root mean square, times the weights; x and y may be the same. */
static __attribute__((noinline)) void norm(const float *x, unsigned weight, float *y, int n) {
    float mean = 0.0f, sum = 0.0f;
#if CENTRED_NORMS
    for (int i = 0; i < n; i++) mean += x[i];
    mean /= (float)n;
#endif
    for (int i = 0; i < n; i++) sum += (x[i] - mean) * (x[i] - mean);
    float factor = 1.0f / __builtin_sqrtf(sum / (float)n + EPSILON);
    for (int i = 0; i < n; i++) y[i] = floats(weight)[i] * ((x[i] - mean) * factor);
}

#ifdef Q_NORM
/* Norm queries or keys: `width` channels together, which are a head's or all. */
static __attribute__((noinline)) void norm_heads(float *x, int n, unsigned weight, int width) {
    for (int i = 0; i < n; i += width) norm(x + i, weight + (OWN_HEAD_NORMS ? 4u * (unsigned)i : 0), x + i, width);
}
#endif

/* Turn the pairs (i, i + ROTARY / 2) of each head by the position's angles. */
static void rotate(float *x, int heads, int set) {
    for (int h = 0; h < heads; h++, x += HEAD_DIM)
        for (int i = 0; i < ROTARY / 2; i++) {
            float a = x[i], b = x[i + ROTARY / 2];
            x[i] = a * act.cosine[set][i] - b * act.sine[set][i];
            x[i + ROTARY / 2] = b * act.cosine[set][i] + a * act.sine[set][i];
        }
}

/* Give a position's queries and keys their norm and their turn. */
static void place(int layer, float *query, float *key) {
#if defined Q_NORM && !ROPE_FIRST
    norm_heads(query, QUERY, NORMS[layer][Q_NORM], Q_NORM_WIDTH);
    norm_heads(key, KEY, NORMS[layer][K_NORM], K_NORM_WIDTH);
#endif
    if (ROPE(layer) >= 0) {
        rotate(query, HEADS, ROPE(layer));
        rotate(key, KV_HEADS, ROPE(layer));
    }
#if defined Q_NORM && ROPE_FIRST
    norm_heads(query, QUERY, NORMS[layer][Q_NORM], Q_NORM_WIDTH);
    norm_heads(key, KEY, NORMS[layer][K_NORM], K_NORM_WIDTH);
#endif
    (void)layer;
}

static void attention(int layer, int position) {
    const float(*keys)[KEY] = cache[0] + ROOM_START(layer), (*values)[KEY] = cache[1] + ROOM_START(layer);
    int seen = SEEN(layer, position);
    for (int h = 0; h < HEADS; h++) {
        const float *q = act.query + h * HEAD_DIM;
        float *out = act.normed + h * HEAD_DIM;
        int own = h / (HEADS / KV_HEADS) * HEAD_DIM;
        float top = 0.0f, sum = 0.0f;
        for (int t = 0; t < seen; t++) {
            float score = ATTENTION_SCALE * dot(F32, (const byte *)(keys[t] + own), q, HEAD_DIM);
#ifdef ATTENTION_CAP
            score = ATTENTION_CAP * hyperbolic_tangent(score / ATTENTION_CAP);
#endif
            act.scores[t] = score;
            if (t == 0 || score > top) top = score;
        }
        for (int i = 0; i < HEAD_DIM; i++) out[i] = 0.0f;
        for (int t = 0; t < seen; t++) {
            float share = exponential(act.scores[t] - top);
            const float *v = values[t] + own;
            sum += share;
            for (int i = 0; i < HEAD_DIM; i++) out[i] += share * v[i];
        }
        for (int i = 0; i < HEAD_DIM; i++) out[i] /= sum;
    }
}

#define NONE (-1)
#ifndef ATTENTION_IN
#define ATTENTION_IN NONE
#endif
#ifndef ATTENTION_OUT
#define ATTENTION_OUT NONE
#endif
#ifndef MLP_IN
#define MLP_IN NONE
#endif
#ifndef MLP_OUT
#define MLP_OUT NONE
#endif

/* What a branch reads: the state, after this norm if there is one. */
static inline const float *entering(int layer, int kind) {
    if (kind == NONE) return act.x;
    norm(act.x, NORMS[layer][kind], act.normed, HIDDEN);
    return act.normed;
}

/* Add the result of a branch's last layer to the state, after this norm if there is one. */
static inline void leave(int layer, const struct linear *last, const float *x, int kind) {
#if BRANCH
    linear(last, x, act.query, 0); /* nobody needs the queries any more */
    if (kind != NONE) norm(act.query, NORMS[layer][kind], act.query, HIDDEN);
    for (int i = 0; i < HIDDEN; i++) {
#ifdef RESIDUAL_SCALE
        act.query[i] *= RESIDUAL_SCALE;
#endif
        act.x[i] += act.query[i];
    }
#else
    (void)layer, (void)kind;
    linear(last, x, act.x, 1);
#endif
}

static void widen(const struct linear *l, const float *x) {
    linear(&l[UP_LAYER], x, act.up, 0);
#if GATED
    linear(&l[GATE_LAYER], x, act.gate, 0);
    for (int i = 0; i < l[UP_LAYER].rows; i++) act.up[i] *= activated(act.gate[i]);
#else
    for (int i = 0; i < l[UP_LAYER].rows; i++) act.up[i] = activated(act.up[i]);
#endif
}

int forward(int token, int position, int want_next) {
    embed(token);
    for (int set = 0; set < ROPES; set++)
        for (int i = 0; i < ROTARY / 2; i++) {
            turn((float)position * FREQUENCIES[set][i], &act.cosine[set][i], &act.sine[set][i]);
#ifdef ROPE_SCALE
            act.cosine[set][i] *= ROPE_SCALE(set);
            act.sine[set][i] *= ROPE_SCALE(set);
#endif
        }
    for (int layer = 0; layer < LAYERS; layer++) {
        const struct linear *l = LINEARS[layer];
        int slot = ROOM_START(layer) + SLOT(layer, position);
        float *key = cache[0][slot], *value = cache[1][slot];
        const float *x = entering(layer, ATTENTION_IN);
        linear(&l[Q_LAYER], x, act.query, 0);
        linear(&l[K_LAYER], x, key, 0);
        linear(&l[V_LAYER], x, value, 0);
#if PARALLEL
        widen(l, x); /* both branches read the same, and attention writes where it lies */
#endif
        place(layer, act.query, key);
        attention(layer, position);
        leave(layer, &l[O_LAYER], act.normed, ATTENTION_OUT);
#if !PARALLEL
        widen(l, entering(layer, MLP_IN));
#endif
        leave(layer, &l[DOWN_LAYER], act.up, MLP_OUT);
    }
    if (!want_next) return 0;
    norm(act.x, FINAL_NORM, act.normed, HIDDEN);
    return likeliest(act.normed);
}
