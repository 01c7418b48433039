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

/* Scales of weights are read 2^112 too small, and those of inputs are kept 2^24 times as large, so that neither leaves
 * the range of a float: a row's sum lacks a factor of 2^88. */
#define INPUT_FACTOR 0x1p24f
#define ROW_FACTOR 0x1p88f
#define TOO_LARGE 0x1p110f /* of an input */

/* Of each group: its scale times the factor as a float, the sum of its inputs, and of each chunk a word's beginning and the
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

/* The largest magnitude of so many inputs, and what they are multiplied by to be rounded. */
INLINED float largest_of(const float *x, int count) {
    word most = 0;
    for (int i = 0; i < count; i++) {
        word magnitude = to_bits(x[i]) & 0x7fffffff;
        if (magnitude > most) most = magnitude;
    }
    return from_bits(most);
}

INLINED float inverse_of(float largest) { return largest < 0x1p-100f || !(largest < TOO_LARGE) ? 0.0f : 127.0f / largest; }

/* The scale of the rounded inputs, a factor higher: no number where there is none, whose products then are none too. */
INLINED word scale_of(float largest) {
    return largest < TOO_LARGE ? to_bits(largest * (INPUT_FACTOR / 127.0f)) : 0x7fc00000;
}

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

/* Fill `inputs`. */
INLINED void round_inputs(int bits, const float *x, int columns, int group) {
    int chunk = chunk_of(bits, group);
    word *to = inputs;
    const float *last = x + columns;
    do {
        float largest = largest_of(x, group), inverse = inverse_of(largest);
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
                MOVED(x, to);
            } while (x < stop);
            word less = (word)(sum * MIDDLE(bits));
            *start = bits == 8 ? -less : (1u << (APART(bits) - 1)) - (less << APART(bits));
            all += sum;
        } while (x < end);
        head[0] = scale_of(largest);
        head[1] = (word)all;
    } while (x < last);
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

/* A float16 times 2^-112. */
INLINED float low_half(half h) { return from_bits((word)(short)h << 13 & 0x8fffffff); }

/* sum of four rows += the products of their next unit. */
#define UNITS(bits)                                                                                                    \
    do {                                                                                                               \
        _Pragma("GCC unroll 4") for (int r = 0; r < ROWS; r++)                                                         \
            products[r] = unit_of(bits, w + r * WORDS(bits), v, products[r]);                                          \
        v += PREPARED(bits), w += ROWS * WORDS(bits);                                                                  \
        MOVED(v, w);                                                                                                   \
    } while (v < stop)

/* Four rows lie side by side, as FORMAT.md says. */
INLINED void integer_rows(int bits, int zeros, const struct linear *l, float *y, int add) {
    int chunk = chunk_of(bits, l->group), many = chunk / UNIT(bits) * PREPARED(bits);
    int whole = l->group / chunk * (many + 1);
    const word *w = (const word *)(weights + l->codes), *last = inputs + l->columns / l->group * (whole + 2);
    for (int left = l->rows; left > 0; left -= ROWS, y += ROWS) {
        float all[ROWS] = {0.0f};
        const word *v = inputs;
        do {
            const half *scales = (const half *)w;
            const byte *points = (const byte *)(w + 2);
            float factor = from_bits(v[0]);
            int inputs_sum = (int)v[1], total[ROWS];
            w += zeros ? 3 : 2;
            v += 2;
            if (bits == 8) { /* one chunk, whose words hold the sum itself */
                word products[ROWS];
#pragma GCC unroll 4
                for (int r = 0; r < ROWS; r++) products[r] = zeros ? -(word)((points[r] + 1) * inputs_sum) : *v;
                const word *stop = ++v + many;
                UNITS(bits);
#pragma GCC unroll 4
                for (int r = 0; r < ROWS; r++) total[r] = (int)products[r];
            } else {
                /* A zero point is stored less one; the middle code is taken off below. */
#pragma GCC unroll 4
                for (int r = 0; r < ROWS; r++) total[r] = zeros ? (MIDDLE(bits) - 1 - points[r]) * inputs_sum : 0;
                const word *end = v + whole;
                do {
                    word products[ROWS] = {*v, *v, *v, *v};
                    const word *stop = ++v + many;
                    UNITS(bits);
#pragma GCC unroll 4
                    for (int r = 0; r < ROWS; r++) total[r] += sum_of(bits, products[r]);
                } while (v < end);
            }
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) all[r] = fused(low_half(scales[r]) * factor, (float)total[r], all[r]);
        } while (v < last);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) all[r] *= ROW_FACTOR;
        put_sums(all, left, y, add);
    }
}

#if LISTED

/* Whether the codes of a list are multiplied two at a time, those that lie 16 bits apart in a word. */
#define PAIRED(bits, tabled) (tabled && (bits == 2 || bits == 4))

/* Fill `inputs` for lists: of each group its scale, then of each group of the pattern and each set the inputs that are
 * kept, a word each, and their sum; or all inputs, a byte each, where they are gathered. Of pairs the input of the lower
 * code stands 16 bits higher. */
INLINED void round_for_list(
    int bits, int kept, int of, int sets, int tabled, const byte (*places)[kept], const float *x, int columns, int group
) {
    word *to = inputs;
    const float *last = x + columns;
    do {
        float largest = largest_of(x, group), inverse = inverse_of(largest);
        int place = 0; /* of a unit's codes */
        *to++ = scale_of(largest);
        for (const float *end = x + group; x < end; x += of, place = (place + kept) % (LIST_UNIT / of * kept)) {
            int q[LIST_UNIT];
            for (int i = 0; i < of; i++) {
                q[i] = nearest(x[i], inverse);
                if (!tabled) ((signed char *)to)[i] = (signed char)q[i];
            }
            if (!tabled) to += of / 4;
            for (int set = 0; tabled && set < sets; set++, to += ENTRY(kept)) {
                int sum = 0;
                for (int j = 0; j < kept; j++) {
                    int own = q[places[set][j]];
                    to[j] = (word)own << (PAIRED(bits, tabled) && ((place + j) * bits & 31) < 16 ? 16 : 0);
                    sum += own;
                }
                to[kept] = (word)sum;
            }
        }
    } while (x < last);
}

/* sum + the products of a row's codes in a unit, whose middle is taken off where they are paired; in: of each of the
 * pattern's groups what its set finds in the table. */
INLINED int listed_products(
    int bits, int kept, int groups, const word *const *in, int some, const word *codes, int first, const word *own, int sum
) {
    const int apart = 16 / bits, mask = (1 << bits) - 1;
    word products = 1u << 15;
    if (!PAIRED(bits, 1)) {
#pragma GCC unroll 32
        for (int p = 0; p < groups * kept; p++) {
            sum += (int)(code_at(bits, codes, first, own, p, 0) * in[p / kept][p % kept]);
            if (p % kept == kept - 1) IN_TURN;
        }
        return sum;
    }
#pragma GCC unroll 32
    for (int p = 0; p < groups * kept; p++)
        if ((p * bits & 31) < 16) {
            int both = p + apart < groups * kept;
            word q = in[p / kept][p % kept];
            if (both) q += in[(p + apart) / kept][(p + apart) % kept];
            products += (own[p * bits / 32] >> (p * bits & 31) & (word)(both ? mask | mask << 16 : mask)) * q;
            IN_TURN;
        }
    return sum + ((int)(products - ((word)some << (15 + bits))) >> 16);
}

/* As `list_rows` in lists.c, in integers. */
INLINED void integer_list_rows(
    int bits, int zeros, int kept, int of, int sets, int set_bits, int tabled, const byte (*places)[kept],
    const struct linear *l, float *y, int add
) {
    const int groups = LIST_UNIT / of, index = (groups * set_bits + 7) / 8, codes = (groups * kept * bits + 7) / 8;
    const int step = tabled ? groups * sets * ENTRY(kept) : LIST_UNIT / 4, middle = PAIRED(bits, tabled) ? MIDDLE(bits) : 0;
    const word *w = (const word *)(weights + l->codes);
    const word *last = inputs + l->columns / l->group + l->columns / LIST_UNIT * step;
    for (int left = l->rows; left > 0; left -= ROWS, y += ROWS) {
        float all[ROWS] = {0.0f};
        const word *v = inputs;
        do {
            const half *scales = (const half *)w;
            const byte *points = (const byte *)(w + 2);
            float factor = from_bits(*v++);
            int sum[ROWS] = {0}, some[ROWS] = {0}; /* of the products, and of the inputs that were kept */
            w += zeros ? 3 : 2;
            for (int n = l->group; n > 0; n -= LIST_UNIT, v += step, w += index + codes)
#pragma GCC unroll 4
                for (int r = 0; r < ROWS; r++) {
                    word chosen = bits_at(w, 8 * index * r, 8 * index);
                    word own[8];
                    const word *in[LIST_UNIT];
                    int found = 0;
                    take_codes(bits, w + index, codes * r, codes, own);
#pragma GCC unroll 16
                    for (int g = 0; g < groups; g++) {
                        int set = (int)(chosen >> g * set_bits & ((1u << set_bits) - 1));
                        in[g] = v + (g * sets + set) * ENTRY(kept);
                        if (tabled) found += (int)in[g][kept];
                        if (!tabled)
#pragma GCC unroll 16
                            for (int j = 0; j < kept; j++) {
                                int q = ((const signed char *)v)[g * of + places[set][j]];
                                sum[r] += (int)code_at(bits, w + index, codes * r, own, g * kept + j, 0) * q;
                                found += q;
                            }
                    }
                    if (tabled) sum[r] = listed_products(bits, kept, groups, in, found, w + index, codes * r, own, sum[r]);
                    some[r] += found;
                }
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) {
                int total = sum[r] - ((zeros ? points[r] + 1 : MIDDLE(bits)) - middle) * some[r];
                all[r] = fused(low_half(scales[r]) * factor, (float)total, all[r]);
            }
        } while (v < last);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) all[r] *= ROW_FACTOR;
        put_sums(all, left, y, add);
    }
}

#endif

void integer_linear(const struct linear *l, const float *x, float *y, int add, int made) {
    switch (l->format) {
#define CASE(name, bits, zeros)                                                                                        \
    case name:                                                                                                         \
        if (!made) round_inputs(bits, x, l->columns, l->group);                                                        \
        integer_rows(bits, zeros, l, y, add);                                                                          \
        break;
    GRIDS(CASE)
#undef CASE
#define CASE(name, bits, zeros, kept, of)                                                                              \
    case name: {                                                                                                       \
        static const byte places[][kept] = {PLACES_##kept##_##of};                                                     \
        const int sets = SETS_##kept##_##of, set_bits = SET_BITS_##kept##_##of, tabled = TABLED_##kept##_##of;         \
        if (!made) round_for_list(bits, kept, of, sets, tabled, places, x, l->columns, l->group);                      \
        integer_list_rows(bits, zeros, kept, of, sets, set_bits, tabled, places, l, y, add);                           \
        break;                                                                                                         \
    }
    LISTS(CASE)
#undef CASE
    }
}

#ifdef HEAD_BITS

float round_state(const float *x) {
    round_inputs(HEAD_BITS, x, HIDDEN, HIDDEN);
    return (float)(int)inputs[1] * (from_bits(inputs[0]) * (1.0f / INPUT_FACTOR));
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
    for (int r = 0; r < rows; r++) y[r] = (float)all[r] * (from_bits(inputs[0]) * (1.0f / INPUT_FACTOR));
}

/* The head's rows lie one after the other. */
void head_products(const byte *codes, int rows, float *y) {
    const word *w = (const word *)codes;
    for (; rows >= ROWS; rows -= ROWS, w += ROWS * HIDDEN / UNIT(HEAD_BITS), y += ROWS) head_rows(ROWS, w, y);
    for (; rows; rows--, w += HIDDEN / UNIT(HEAD_BITS), y++) head_rows(1, w, y);
}

#endif
#endif
