/* Products of lists with floats: of an N:M pattern the kept weights alone, as codes of a grid or as numbers. */

#include "products.h"

#if NUMBERS_LISTED || LISTED && INPUT_BITS == 32

/* The bit of its word at which the code `place` of a row's unit begins, unless it is moved. */
#define LOW_BIT(bits, place) (bits >= 8 || (bits * (place) & 31) + bits > 32 ? 0 : bits * (place) & 31)

#if INPUT_NUMBERS
#define PREPARED prepared
#else
#define PREPARED x
#endif

/* A table in `prepared`: of each group and each set the inputs that are kept, divided as their codes stand, and their
 * sum; for numbers (32 bits) the inputs alone. */
INLINED void tabulate(int bits, int kept, int of, int sets, const byte (*places)[kept], const float *x, int columns) {
#if INPUT_NUMBERS
    float *to = prepared;
    int place = 0;
    for (const float *last = x + columns; x < last; x += of, place = (place + kept) % (LIST_UNIT / of * kept)) {
        float factors[8]; /* tables have sets of fewer */
#pragma GCC unroll 8
        for (int j = 0; j < kept; j++) factors[j] = from_bits((word)(127 - LOW_BIT(bits, place + j)) << 23);
#pragma GCC unroll 8
        for (int set = 0; set < sets; set++, to += ENTRY(kept)) {
            float sum = 0.0f;
#pragma GCC unroll 8
            for (int j = 0; j < kept; j++) {
                float value = x[places[set][j]];
                sum = j ? sum + value : value;
                to[j] = bits >= 8 ? value : value * factors[j];
            }
            if (bits <= 8) to[kept] = sum;
        }
    }
#else /* every form gathers */
    (void)bits, (void)of, (void)sets, (void)places, (void)x, (void)columns;
#endif
}

#if LISTED && INPUT_BITS == 32

/* Four rows side by side as in a grid; of each unit the numbers of their sets, then their codes. */
INLINED void list_rows(
    int bits, int zeros, int kept, int of, int sets, int set_bits, int tabled, const byte (*places)[kept],
    const struct linear *l, const float *x, float *y, int add
) {
    const int groups = LIST_UNIT / of, index = (groups * set_bits + 7) / 8, codes = (groups * kept * bits + 7) / 8;
    const int entry = ENTRY(kept), step = tabled ? groups * sets * entry : LIST_UNIT;
    const word *w = (const word *)(weights + l->codes);
    for (int left = l->rows; left > 0; left -= ROWS, y += ROWS) {
        const float *v = x;
        float all[ROWS] = {0.0f};
        for (int column = 0; column < l->columns; column += l->group) {
            const half *scales = (const half *)w;
            const byte *points = (const byte *)(w + 2);
            float sum[ROWS] = {0.0f}, inputs[ROWS] = {0.0f}; /* of the products, and of the inputs that were kept */
            w += zeros ? 3 : 2;
            for (int n = l->group; n > 0; n -= LIST_UNIT, v += step, w += index + codes)
#pragma GCC unroll 4
                for (int r = 0; r < ROWS; r++) {
                    word numbers = bits_at(w, 8 * index * r, 8 * index);
                    word own[8];
                    take_codes(bits, w + index, codes * r, codes, own);
#pragma GCC unroll 16
                    for (int g = 0; g < groups; g++) {
                        int size = tabled ? 4 * entry : kept; /* of what a set's number finds, in bytes */
                        word number = numbers >> g * set_bits & ((1u << set_bits) - 1);
                        const float *in = (const float *)((const char *)(v + g * sets * entry) + number * (word)size);
                        const byte *at = (const byte *)places + number * (word)size;
#pragma GCC unroll 16
                        for (int j = 0; j < kept; j++) {
                            word code = code_at(bits, w + index, codes * r, own, g * kept + j, tabled);
                            float value = tabled ? in[j] : v[g * of + at[j]];
                            sum[r] = fused((float)code, value, sum[r]);
                            if (!tabled) inputs[r] += value;
                        }
                        if (tabled) inputs[r] += in[kept];
                        IN_TURN;
                    }
                }
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) {
                float zero = zeros ? (float)(points[r] + 1) : (float)(1 << (bits - 1));
                all[r] = fused(from_half(scales[r]), fused(-zero, inputs[r], sum[r]), all[r]);
            }
        }
        put_sums(all, left, y, add);
    }
}

#endif

/* Of numbers: of each unit the numbers of four rows' sets, then their weights. */
INLINED void number_rows(
    unsigned format, int kept, int of, int sets, int set_bits, int tabled, const byte (*places)[kept],
    const struct linear *l, const float *x, float *y, int add
) {
    const int groups = LIST_UNIT / of, index = (groups * set_bits + 7) / 8, entry = ENTRY(kept);
    const int numbers = (int)row_bytes(format, (word)(groups * kept)), step = tabled ? groups * sets * entry : LIST_UNIT;
    const byte *w = weights + l->codes;
    for (int left = l->rows; left > 0; left -= ROWS, y += ROWS) {
        const float *v = x;
        float sum[ROWS] = {0.0f};
        for (int n = l->columns; n > 0; n -= LIST_UNIT, v += step, w += ROWS * (index + numbers))
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) {
                word chosen = bits_at((const word *)w, 8 * index * r, 8 * index);
                const byte *own = w + ROWS * index + r * numbers;
#pragma GCC unroll 16
                for (int g = 0; g < groups; g++) {
                    word set = chosen >> g * set_bits & ((1u << set_bits) - 1);
                    const float *in = v + g * sets * entry + set * (word)entry;
                    const byte *at = places[set];
#pragma GCC unroll 32
                    for (int j = 0; j < kept; j++)
                        sum[r] = fused(number(format, own, g * kept + j), tabled ? in[j] : v[g * of + at[j]], sum[r]);
#ifndef __clang__ /* which needs no help here */
                    IN_TURN;
#endif
                }
            }
        put_sums(sum, left, y, add);
    }
}

int list_linear(const struct linear *l, const float *x, float *y, int add, int made) {
    switch (l->format) {
#define CASE(name, kept, of, bits, product)                                                                            \
    case name: {                                                                                                       \
        static const byte places[][kept] = {PLACES_##kept##_##of};                                                     \
        const int sets = SETS_##kept##_##of, set_bits = SET_BITS_##kept##_##of, tabled = TABLED_##kept##_##of;         \
        if (tabled && !made) tabulate(bits, kept, of, sets, places, x, l->columns);                                    \
        product;                                                                                                       \
        return 1;                                                                                                      \
    }
#if INPUT_BITS == 32
#define CODES(name, bits, zeros, kept, of)                                                                             \
    CASE(name, kept, of, bits,                                                                                         \
         list_rows(bits, zeros, kept, of, sets, set_bits, tabled, places, l, tabled ? PREPARED : x, y, add))
    LISTS(CODES)
#endif
#define NUMBERS_OF(name, format, kept, of)                                                                             \
    CASE(name, kept, of, 32,                                                                                           \
         number_rows(format, kept, of, sets, set_bits, tabled, places, l, tabled ? PREPARED : x, y, add))
    NUMBER_LISTS(NUMBERS_OF)
    }
    return 0;
}

#endif
