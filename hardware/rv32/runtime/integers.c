/* Products of codes with inputs that are rounded to 8 bits: in integers, and a factor for each group of each row.
 *
 * Inputs q of -127 to 127 share a scale with those that their weights' group multiplies. Codes c that share words are
 * multiplied two at a time: (c + d 2^S) (r + q 2^S) has c q + d r at 2^S, for two masked codes that lie S bits apart.
 * Such products are added up in one word. What lies below 2^S is a sum of c r, of either sign: the word begins with half
 * of 2^S, so that a shift rounds it away. What lies above is cut off, as is the carry out of the bits that are left for
 * the sum itself: 16, of 3-bit codes 15. It comes out exact where it lies within them, and for a chunk of columns it does
 * once the middle code's share is taken off, with which the word begins as well. */

#include "products.h"

#if INPUT_BITS == 8

#define UNIT(bits) ((bits) == 2 ? 16 : (bits) == 3 ? 32 : (bits) == 4 ? 8 : 4) /* columns whose codes fill whole words */
#define WORDS(bits) ((bits) == 3 ? 3 : 1) /* that they fill */
#define PREPARED(bits) ((bits) == 8 ? 1 : UNIT(bits) / 2) /* words that their inputs take: by fours as bytes, or by twos */
#define MIDDLE(bits) (1 << ((bits) - 1))
#define APART(bits) ((bits) == 3 ? 15 : 16) /* S */
#define CHUNK(bits) ((bits) == 2 ? 128 : 32) /* columns, at most */

/* Of each group: its scale times 2^112 as a float, the sum of its inputs, and of each chunk a word's beginning and the
 * inputs. */
static word inputs[INPUT_WORDS];

/* Columns whose products are added up in one word: a power of two. Products of bytes have words of their own. */
INLINED int chunk_of(int bits, int group) {
    int chunk = group & -group;
    return bits == 8 ? group : chunk < CHUNK(bits) ? chunk : CHUNK(bits);
}

/* --- rounding ----------------------------------------------------------------------------------------------------- */

/* x times inverse to the nearest, halves to even: the last bit of the sum is worth one. */
INLINED int nearest(float x, float inverse) { return (int)(to_bits(fused(x, inverse, 0x1.8p23f)) - to_bits(0x1.8p23f)); }

/* Lay a unit of inputs out as `unit_of` takes it; their sum. */
INLINED int round_unit(int bits, const float *x, float inverse, word *to) {
    int sum = 0;
#define PAIR(place, first, second)                                                                                     \
    do {                                                                                                               \
        int q = nearest(x[first], inverse), r = nearest(x[second], inverse);                                           \
        to[place] = (word)r + ((word)q << APART(bits));                                                                \
        sum += q + r;                                                                                                  \
    } while (0)
    if (bits == 8) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            int q = nearest(x[i], inverse);
            ((signed char *)to)[i] = (signed char)q;
            sum += q;
        }
    } else if (bits == 3) {
#pragma GCC unroll 5
        for (int i = 0; i < 5; i++) {
            PAIR(i, i, i + 5);
            PAIR(i + 5, i + 11, i + 16);
            PAIR(i + 10, i + 22, i + 27);
        }
        PAIR(15, 10, 21);
    } else if (bits == 4) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) PAIR(i, i, i + 4);
    } else {
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) PAIR(i, i, i + 8);
    }
#undef PAIR
    return sum;
}

/* Fill `inputs`, which ends where this points. */
INLINED const word *round_inputs(int bits, const float *x, int columns, int group) {
    int chunk = chunk_of(bits, group);
    word *to = inputs;
    const float *last = x + columns;
    do {
        word most = 0;
        for (int i = 0; i < group; i++) {
            word magnitude = to_bits(x[i]) & 0x7fffffff;
            if (magnitude > most) most = magnitude;
        }
        float largest = from_bits(most), inverse = largest < 0x1p-100f ? 0.0f : 127.0f / largest;
        word *head = to;
        int all = 0;
        to += 2;
        const float *end = x + group;
        do {
            word *start = to++;
            int sum = 0;
            const float *stop = x + chunk;
            do {
                sum += round_unit(bits, x, inverse, to);
                x += UNIT(bits), to += PREPARED(bits);
            } while (x < stop);
            word less = (word)(sum * MIDDLE(bits));
            *start = bits == 8 ? -less : (1u << (APART(bits) - 1)) - (less << APART(bits));
            all += sum;
        } while (x < end);
        head[0] = to_bits(largest * (0x1p112f / 127.0f));
        head[1] = (word)all;
    } while (x < last);
    return to;
}

/* --- products ----------------------------------------------------------------------------------------------------- */

/* sum + the products of a unit. */
INLINED word unit_of(int bits, const word *w, const word *v, word sum) {
    if (bits == 8) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) sum += (word)(((const byte *)w)[i] * ((const signed char *)v)[i]);
    } else if (bits == 4) {
        word a = w[0];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) sum += (a >> 4 * i & 0x000f000f) * v[i];
    } else if (bits == 2) {
        word a = w[0];
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) sum += (a >> 2 * i & 0x00030003) * v[i];
    } else { /* 32 codes in three words; the codes 10 and 21 cross a border */
        word a = w[0], b = w[1], c = w[2];
#pragma GCC unroll 5
        for (int i = 0; i < 5; i++) sum += (a >> 3 * i & 0x00038007) * v[i];
#pragma GCC unroll 5
        for (int i = 0; i < 5; i++) sum += (b >> (3 * i + 1) & 0x00038007) * v[i + 5];
#pragma GCC unroll 5
        for (int i = 0; i < 5; i++) sum += (c >> (3 * i + 2) & 0x00038007) * v[i + 10];
        sum += ((a >> 30 | (b << 2 & 4)) | (b >> 31 | (c << 1 & 6)) << 15) * v[15];
    }
    return sum;
}

/* What a word of products has at 2^S. */
INLINED int sum_of(int bits, word sum) {
    return bits == 8 ? (int)sum : bits == 3 ? (int)(sum << 2) >> 17 : (int)sum >> 16;
}

/* A float16 times 2^-112: the groups' scales give it back. */
INLINED float low_half(half h) { return from_bits((word)(short)h << 13 & 0x8fffffff); }

/* Four rows lie side by side, as FORMAT.md says. */
INLINED void integer_rows(int bits, int zeros, const struct linear *l, const word *last, float *y, int add) {
    int chunk = chunk_of(bits, l->group), many = chunk / UNIT(bits) * PREPARED(bits);
    int whole = l->group / chunk * (many + 1);
    const word *w = (const word *)(weights + l->codes);
    for (int left = l->rows; left > 0; left -= ROWS, y += ROWS) {
        float all[ROWS] = {0.0f};
        const word *v = inputs;
        do {
            const half *scales = (const half *)w;
            const byte *points = (const byte *)(w + 2);
            float scale[ROWS], factor = from_bits(v[0]);
            int sum = (int)v[1];
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) {
                scale[r] = low_half(scales[r]) * factor;
                /* A zero point is stored less one; the middle code is taken off below. */
                if (zeros) all[r] = fused(scale[r], (float)((MIDDLE(bits) - 1 - points[r]) * sum), all[r]);
            }
            w += zeros ? 3 : 2;
            v += 2;
            const word *end = v + whole;
            do {
                word products[ROWS] = {*v, *v, *v, *v};
                const word *stop = ++v + many;
                do {
#pragma GCC unroll 4
                    for (int r = 0; r < ROWS; r++) products[r] = unit_of(bits, w + r * WORDS(bits), v, products[r]);
                    v += PREPARED(bits), w += ROWS * WORDS(bits);
                } while (v < stop);
#pragma GCC unroll 4
                for (int r = 0; r < ROWS; r++) all[r] = fused(scale[r], (float)sum_of(bits, products[r]), all[r]);
            } while (v < end);
        } while (v < last);
        put_sums(all, left, y, add);
    }
}

void integer_linear(const struct linear *l, const float *x, float *y, int add) {
    switch (l->format) {
#define CASE(name, bits, zeros)                                                                                        \
    case name: integer_rows(bits, zeros, l, round_inputs(bits, x, l->columns, l->group), y, add); break;
    GRIDS(CASE)
#undef CASE
    }
}

#ifdef HEAD_BITS

float round_state(const float *x) {
    round_inputs(HEAD_BITS, x, HIDDEN, HIDDEN);
    return (float)(int)inputs[1] * (from_bits(inputs[0]) * 0x1p-112f);
}

/* Of so many rows, a constant. */
INLINED void head_rows(int rows, const word *w, float *y) {
    const int stride = HIDDEN / UNIT(HEAD_BITS), chunk = chunk_of(HEAD_BITS, HIDDEN);
    const word *v = inputs + 2, *end = v + HIDDEN / chunk * (chunk / UNIT(HEAD_BITS) * PREPARED(HEAD_BITS) + 1);
    int all[ROWS];
    for (int r = 0; r < rows; r++) all[r] = MIDDLE(HEAD_BITS) * (int)inputs[1];
    do {
        word products[ROWS] = {*v, *v, *v, *v};
        const word *stop = ++v + chunk / UNIT(HEAD_BITS) * PREPARED(HEAD_BITS);
        do {
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) products[r] = unit_of(HEAD_BITS, w + r * stride, v, products[r]);
            v += PREPARED(HEAD_BITS), w++;
        } while (v < stop);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) all[r] += sum_of(HEAD_BITS, products[r]);
    } while (v < end);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) y[r] = (float)all[r] * (from_bits(inputs[0]) * 0x1p-112f);
}

/* The head's rows lie one after the other. */
void head_products(const byte *codes, int rows, float *y) {
    const word *w = (const word *)codes;
    for (; rows >= ROWS; rows -= ROWS, w += ROWS * HIDDEN / UNIT(HEAD_BITS), y += ROWS) head_rows(ROWS, w, y);
    for (; rows; rows--, w += HIDDEN / UNIT(HEAD_BITS), y++) head_rows(1, w, y);
}

#endif
#endif
