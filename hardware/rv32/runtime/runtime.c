/* A LLaMA-like model, one token at a time, in float32. No heap, no libc: freestanding C for RV32IMF.
 *
 * What differs between families are macros and tables of model.h: a model has no code for the parts of others.
 *
 * Weights and tables are constant; the KV cache and the vectors below are all the memory that is written besides the
 * stack. Nothing is read before it was written, so nothing has to be cleared at the start. */

#include "products.h"

#define LARGER(a, b) ((a) > (b) ? (a) : (b))
#define QUERY (HEADS * HEAD_DIM)
#define KEY (KV_HEADS * HEAD_DIM)
/* Heads that read the same keys and values are gone through two at a time: a number is read once for both. */
#define ABREAST (HEADS / KV_HEADS % 2 ? 1 : 2)

#if KV_BITS == 8
typedef signed char kept;
#else
typedef float kept;
#endif

static struct {
    kept numbers[2][ALL_ROOM][KEY]; /* keys, values */
#if KV_BITS == 8
    half scales[2][ALL_ROOM][KV_HEADS]; /* by which a head's numbers are multiplied: the upper half of a float */
#endif
} cache __attribute__((section(".bss.kv")));
static struct {
    float x[HIDDEN];                      /* the token's state */
    float normed[LARGER(HIDDEN, QUERY)];  /* what a layer reads: the state after a norm, or attention's result */
    float query[BRANCH ? LARGER(HIDDEN, QUERY) : QUERY]; /* with BRANCH also what a branch adds to the state */
#if GATED
    float gate[INTERMEDIATE];
#endif
    float up[INTERMEDIATE];
    float scores[ABREAST][MOST_ROOM];
#if KV_BITS == 8
    float fresh[2][KEY]; /* a token's key and value before they are kept */
#endif
#ifdef ORDERED
    float ordered[ORDERED];
#endif
    float cosine[ROPES][ROTARY / 2], sine[ROPES][ROTARY / 2];
} act;

/* --- functions ---------------------------------------------------------------------------------------------------- */

#ifdef ATTENTION_CAP
static float hyperbolic_tangent(float x) {
    float xx = x * x;
    if (xx < 0.0625f) { /* Taylor's series: the difference below would cancel */
        float p = fused(62.0f / 2835, xx, -17.0f / 315);
        p = fused(p, xx, 2.0f / 15);
        p = fused(p, xx, -1.0f / 3);
        return x * fused(p, xx, 1.0f);
    }
    return 1.0f - 2.0f / (1.0f + exponential(2.0f * x));
}
#endif

static float activated(float x) {
    switch (ACTIVATION) {
    case ACT_SILU: return x / (1.0f + exponential(-x));
    case ACT_GELU: {
        /* The error function by a polynomial (Abramowitz and Stegun 7.1.26), to 1.5e-7. */
        float z = (x < 0.0f ? -x : x) * 0.707106781f;
        float t = 1.0f / fused(0.3275911f, z, 1.0f);
        float p = fused(1.061405429f, t, -1.453152027f);
        p = fused(p, t, 1.421413741f);
        p = fused(p, t, -0.284496736f);
        p = fused(p, t, 0.254829592f);
        float tail = 0.5f * (p * t) * exponential(-z * z); /* of the normal distribution, beyond |x| */
        return x * (x < 0.0f ? tail : 1.0f - tail);
    }
    case ACT_GELU_PYTORCH_TANH: return x / (1.0f + exponential(-1.59576912f * fused(0.044715f * x * x, x, x)));
    case ACT_RELU: return x > 0.0f ? x : 0.0f;
    default: return x > 0.0f ? x * x : 0.0f;
    }
}

/* --- a block ------------------------------------------------------------------------------------------------------ */

/* y = x over its root mean square, times the weights; x and y may be the same. */
static OPERATOR void norm(const float *x, unsigned weight, float *y, int n) {
    float mean = 0.0f, sum = 0.0f;
#if CENTRED_NORMS
    for (int i = 0; i < n; i++) mean += x[i];
    mean /= (float)n;
#endif
    for (int i = 0; i < n; i++) sum = fused(x[i] - mean, x[i] - mean, sum);
    float factor = 1.0f / __builtin_sqrtf(sum / (float)n + EPSILON);
    for (int i = 0; i < n; i++) y[i] = floats(weight)[i] * ((x[i] - mean) * factor);
}

#ifdef Q_NORM
/* Norm queries or keys: `width` channels together, which are a head's or all. */
static OPERATOR void norm_heads(float *x, int n, unsigned weight, int width) {
    for (int i = 0; i < n; i += width) norm(x + i, weight + (OWN_HEAD_NORMS ? 4u * (unsigned)i : 0), x + i, width);
}
#endif

/* Turn the pairs (i, i + ROTARY / 2) of each head by the position's angles. */
static OPERATOR void rotate(float *x, int heads, int set) {
    for (int h = 0; h < heads; h++, x += HEAD_DIM)
        for (int i = 0; i < ROTARY / 2; i++) {
            float a = x[i], b = x[i + ROTARY / 2];
            x[i] = fused(a, act.cosine[set][i], -(b * act.sine[set][i]));
            x[i + ROTARY / 2] = fused(b, act.cosine[set][i], a * act.sine[set][i]);
        }
}

/* Give a position's queries and keys their norm and their turn. */
INLINED void place(int layer, float *query, float *key) {
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

#if KV_BITS == 8
/* Round a token's key or value to codes of -127 to 127 times a scale for each head, which is itself rounded up. */
static OPERATOR void keep(const float *x, int which, int slot) {
    for (int h = 0; h < KV_HEADS; h++, x += HEAD_DIM) {
        float most = 0.0f;
        for (int i = 0; i < HEAD_DIM; i++) most = larger(most, __builtin_fabsf(x[i]));
        word scale = (to_bits(most / 127.0f) + 0xffff) >> 16;
        float inverse = from_brain(scale) < 0x1p-100f ? 0.0f : 1.0f / from_brain(scale);
        cache.scales[which][slot][h] = (half)scale;
        for (int i = 0; i < HEAD_DIM; i++)
            cache.numbers[which][slot][h * HEAD_DIM + i] = (kept)(int)fused(x[i], inverse, x[i] < 0.0f ? -0.5f : 0.5f);
    }
}
#define KEPT_SCALE(which, slot, head) from_brain(cache.scales[which][slot][head])
#else
#define KEPT_SCALE(which, slot, head) 1.0f
#endif

/* Channels of a head that stay in registers while all tokens are gone through. */
#define TOGETHER (HEAD_DIM % 8 ? HEAD_DIM % 2 ? 1 : 2 : 8)

/* The scores of the heads from h on, and the largest of each. */
INLINED void compare(int h, int first, int seen, int shared, float *top) {
#pragma GCC unroll 2
    for (int a = 0; a < ABREAST; a++) top[a] = -LARGEST;
    for (int i = 0; i < HEAD_DIM; i += TOGETHER) {
        const kept *k = cache.numbers[0][first] + shared * HEAD_DIM + i;
        float some[ABREAST][TOGETHER]; /* of the queries */
#pragma GCC unroll 2
        for (int a = 0; a < ABREAST; a++)
#pragma GCC unroll 8
            for (int c = 0; c < TOGETHER; c++) some[a][c] = act.query[(h + a) * HEAD_DIM + i + c] * ATTENTION_SCALE;
        for (int t = 0; t < seen; t++, k += KEY) {
            float score[ABREAST];
#pragma GCC unroll 2
            for (int a = 0; a < ABREAST; a++) score[a] = i ? act.scores[a][t] : 0.0f;
#pragma GCC unroll 8
            for (int c = 0; c < TOGETHER; c++) {
                float number = (float)k[c];
#pragma GCC unroll 2
                for (int a = 0; a < ABREAST; a++) score[a] = fused(number, some[a][c], score[a]);
            }
#pragma GCC unroll 2
            for (int a = 0; a < ABREAST; a++) {
                if (i == HEAD_DIM - TOGETHER) { /* the last of them */
                    score[a] *= KEPT_SCALE(0, first + t, shared);
#ifdef ATTENTION_CAP
                    score[a] = ATTENTION_CAP * hyperbolic_tangent(score[a] / ATTENTION_CAP);
#endif
                    top[a] = larger(top[a], score[a]);
                }
                act.scores[a][t] = score[a];
            }
        }
    }
}

/* Each score's part in a head's result, times their sum, which is returned. Not inlined: its constants need registers. */
static __attribute__((noinline)) float share(float *scores, int seen, float top) {
    float sum = 0.0f;
    for (int t = 0; t < seen; t++) {
        scores[t] = decay(scores[t] - top);
        sum += scores[t];
    }
    return sum;
}

static OPERATOR void attention(int layer, int position) {
    int first = ROOM_START(layer);
    int seen = SEEN(layer, position);
    for (int h = 0; h < HEADS; h += ABREAST) {
        int shared = h / (HEADS / KV_HEADS);
        float top[ABREAST], sum[ABREAST];
        compare(h, first, seen, shared, top);
        for (int a = 0; a < ABREAST; a++) sum[a] = share(act.scores[a], seen, top[a]);
        for (int i = 0; i < HEAD_DIM; i += TOGETHER) {
            const kept *v = cache.numbers[1][first] + shared * HEAD_DIM + i;
            float all[ABREAST][TOGETHER] = {{0.0f}};
            for (int t = 0; t < seen; t++, v += KEY) {
                float part[ABREAST];
#pragma GCC unroll 2
                for (int a = 0; a < ABREAST; a++) part[a] = act.scores[a][t] * KEPT_SCALE(1, first + t, shared);
#pragma GCC unroll 8
                for (int c = 0; c < TOGETHER; c++) {
                    float number = (float)v[c];
#pragma GCC unroll 2
                    for (int a = 0; a < ABREAST; a++) all[a][c] = fused(part[a], number, all[a][c]);
                }
            }
#pragma GCC unroll 2
            for (int a = 0; a < ABREAST; a++)
#pragma GCC unroll 8
                for (int c = 0; c < TOGETHER; c++) act.normed[(h + a) * HEAD_DIM + i + c] = all[a][c] / sum[a];
        }
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

#ifdef ORDERED
/* A layer's input with its numbers group by group, where the groups of its weights do not lie in their order. */
static OPERATOR const float *arrange(const float *x, unsigned order, int n) {
    const half *places = (const half *)(weights + order);
    if (!order) return x;
    for (int i = 0; i < n; i++) act.ordered[i] = x[places[i]];
    return act.ordered;
}
#define ARRANGED(x, layer, role) arrange(x, ORDERS[layer][role], LINEARS[layer][role].columns)
#define LIKE(layer, role) 0 /* each layer has an order of its own */
#else
#define ARRANGED(x, layer, role) (x)
#define LIKE(layer, role) (&LINEARS[layer][role])
#endif

/* like: the layer that was applied just before, to the same x, or none. */
INLINED void apply(int layer, int role, const float *x, float *y, int add, const struct linear *like) {
    linear(&LINEARS[layer][role], ARRANGED(x, layer, role), y, add, like);
}

/* What a branch reads: the state, after this norm if there is one. */
INLINED const float *entering(int layer, int kind) {
    if (kind == NONE) return act.x;
    norm(act.x, NORMS[layer][kind], act.normed, HIDDEN);
    return act.normed;
}

/* Add the result of a branch's last layer to the state, after this norm if there is one. */
INLINED void leave(int layer, int role, const float *x, int kind) {
#if BRANCH
    apply(layer, role, x, act.query, 0, 0); /* nobody needs the queries any more */
    if (kind != NONE) norm(act.query, NORMS[layer][kind], act.query, HIDDEN);
    for (int i = 0; i < HIDDEN; i++) {
#ifdef RESIDUAL_SCALE
        act.x[i] = fused(act.query[i], RESIDUAL_SCALE, act.x[i]);
#else
        act.x[i] += act.query[i];
#endif
    }
#else
    (void)kind;
    apply(layer, role, x, act.x, 1, 0);
#endif
}

/* What lies between the layers of a feed-forward part of n channels. */
static OPERATOR void activate(int n) {
#if GATED
    for (int i = 0; i < n; i++) act.up[i] *= activated(act.gate[i]);
#else
    for (int i = 0; i < n; i++) act.up[i] = activated(act.up[i]);
#endif
}

INLINED void widen(int layer, const float *x) {
    apply(layer, UP_LAYER, x, act.up, 0, 0);
#if GATED
    apply(layer, GATE_LAYER, x, act.gate, 0, LIKE(layer, UP_LAYER));
#endif
    activate(LINEARS[layer][UP_LAYER].rows);
}

/* The cosines and sines of a position's angles. */
static OPERATOR void angles(int position) {
    for (int set = 0; set < ROPES; set++)
        for (int i = 0; i < ROTARY / 2; i++) {
            turn((float)position * FREQUENCIES[set][i], &act.cosine[set][i], &act.sine[set][i]);
#ifdef ROPE_SCALE
            act.cosine[set][i] *= ROPE_SCALE(set);
            act.sine[set][i] *= ROPE_SCALE(set);
#endif
        }
}

int forward(int token, int position, int want_next) {
    embed(token, act.x);
    angles(position);
    for (int layer = 0; layer < LAYERS; layer++) {
        int slot = ROOM_START(layer) + SLOT(layer, position);
#if KV_BITS == 8
        float *key = act.fresh[0], *value = act.fresh[1];
#else
        float *key = cache.numbers[0][slot], *value = cache.numbers[1][slot];
#endif
        const float *x = entering(layer, ATTENTION_IN);
        apply(layer, Q_LAYER, x, act.query, 0, 0);
        apply(layer, K_LAYER, x, key, 0, LIKE(layer, Q_LAYER));
        apply(layer, V_LAYER, x, value, 0, LIKE(layer, K_LAYER));
#if PARALLEL
        widen(layer, x); /* both branches read the same, and attention writes where it lies */
#endif
        place(layer, act.query, key);
#if KV_BITS == 8
        keep(key, 0, slot);
        keep(value, 1, slot);
#endif
        attention(layer, position);
        leave(layer, O_LAYER, act.normed, ATTENTION_OUT);
#if !PARALLEL
        widen(layer, entering(layer, MLP_IN));
#endif
        leave(layer, DOWN_LAYER, act.up, MLP_OUT);
    }
    if (!want_next) return 0;
    norm(act.x, FINAL_NORM, act.normed, HIDDEN);
    return likeliest(act.normed);
}
