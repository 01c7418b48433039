/* What reads weights.bin: the layers' products with vectors. */

#ifndef PRODUCTS_H
#define PRODUCTS_H

#include "model.h"
#include "numbers.h"

static inline const float *floats(unsigned offset) { return (const float *)(weights + offset); }

/* Bytes of a row of n numbers. */
static inline word row_bytes(unsigned format, word n) {
    switch (format) {
    case F32: return 4 * n;
    case F16: case BF16: return 2 * n;
    case U4: return n / 2;
    default: return n;
    }
}

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

#define ROWS 4 /* of a matrix that are multiplied together */

/* What is read before and after stays there: compilers would read more ahead than registers can hold. */
#define IN_TURN __asm__ volatile("" ::: "memory")

/* Both pointers move on from where they are: gcc would count a loop's rounds instead, and compute where they end anew. */
#define MOVED(a, b) __asm__("" : "+r"(a), "+r"(b))

/* The sums of the rows that there are, four or fewer at a matrix's end, into y or added to it. */
INLINED void put_sums(const float *sum, int left, float *y, int add) {
    if (left >= ROWS && add)
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) y[r] += sum[r];
    else if (left >= ROWS)
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) y[r] = sum[r];
    else /* no index that is known only when it runs: the sums would have to lie in memory */
#pragma GCC unroll 4
        for (int r = 0; r < ROWS - 1; r++)
            if (r < left) y[r] = add ? y[r] + sum[r] : sum[r];
}

/* y = W x + bias, or y += W x + bias; W is what is stored, and the adapter's B diag(scales) A. like: the layer whose
 * product with the same x was the last one, or none; where its codes lie alike, what it made of x is taken again. */
void linear(const struct linear *l, const float *x, float *y, int add, const struct linear *like);

#if INPUT_NUMBERS
extern float prepared[INPUT_NUMBERS]; /* what is made of x for a product in floats */
#endif

#if LISTED || NUMBERS_LISTED
/* Lists (lists.c): of an N:M pattern the codes or numbers of the kept weights alone. A group of the pattern has the number
 * of the set of its places that are kept. */
#define LIST_UNIT 32 /* columns whose numbers and codes lie together */
#define ENTRY(kept) (kept == 1 ? 2 : kept < 4 ? 4 : kept < 8 ? 8 : kept < 16 ? 16 : 32) /* numbers of a set in the table */

/* The 32 bits of a stream of words from bit `first` on, of which `count` are asked for. */
INLINED word bits_at(const word *w, int first, int count) {
    int at = first / 32, from = first % 32;
    return from + count > 32 ? w[at] >> from | w[at + 1] << (32 - from) : w[at] >> from;
}

/* A row's codes of a unit, `bytes` of them from `first` on, each word from its lowest bit; those of 8 bits are read where
 * they lie. */
INLINED void take_codes(int bits, const word *w, int first, int bytes, word *own) {
    if (bits < 8)
#pragma GCC unroll 8
        for (int k = 0; k < (bytes + 3) / 4; k++) {
            int rest = 8 * bytes - 32 * k;
            own[k] = bits_at(w, 8 * first + 32 * k, rest < 32 ? rest : 32);
        }
}

/* The code at a place of them; in_place: not moved to the lower end, unless it crosses a word's. */
INLINED word code_at(int bits, const word *w, int first, const word *own, int place, int in_place) {
    int bit = bits * place & 31, at = bits * place / 32;
    word mask = (1u << bits) - 1;
    if (bits == 8) return ((const byte *)w)[first + place];
    if (bit + bits > 32) return (own[at] >> bit | own[at + 1] << (32 - bit)) & mask;
    return in_place ? own[at] & mask << bit : own[at] >> bit & mask;
}

/* y = W x or y += W x for a layer that floats are multiplied with; 0 where it is none of these. */
int list_linear(const struct linear *l, const float *x, float *y, int add, int made);
#endif

#if INPUT_BITS == 8 /* integers.c */
/* y = W x or y += W x, of codes of a grid, with x rounded to 8 bits, unless it was just before. */
void integer_linear(const struct linear *l, const float *x, float *y, int add, int made);

/* Round the state for the head; the sum of what it is then. */
float round_state(const float *x);

/* y = code x of so many rows of the head. */
void head_products(const byte *codes, int rows, float *y);
#endif

/* x = the token's row of the embedding. */
void embed(int token, float *x);

/* The first of the largest logits, without keeping them. */
int likeliest(const float *x);

#endif
