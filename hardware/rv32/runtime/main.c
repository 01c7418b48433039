/* Feed the prompt, then write on greedily: what the chip does.
 *
 * Two calls go to whoever runs the program (`ecall`, number in a7): 1 hands over a token with the bytes of its text,
 * 2 says that it is done. On a board they would be a serial port and an endless loop. */

#include "model.h"

static void call(unsigned number, unsigned a, unsigned b, unsigned c) {
    register unsigned a0 __asm__("a0") = a, a1 __asm__("a1") = b, a2 __asm__("a2") = c, a7 __asm__("a7") = number;
    __asm__ volatile("ecall" : "+r"(a0) : "r"(a1), "r"(a2), "r"(a7) : "memory");
}

static void put(int token) {
    const unsigned *starts = (const unsigned *)(weights + PIECE_STARTS);
    call(1, (unsigned)token, (unsigned)(weights + PIECES) + starts[token], starts[token + 1] - starts[token]);
}

static int ends(int token) {
    for (int i = 0; i < END_TOKENS; i++)
        if (ENDS[i] == token) return 1;
    return 0;
}

int main(void) {
    int position = 0;
    for (; position < PROMPT_TOKENS - 1; position++) {
        put(PROMPT[position]);
        forward(PROMPT[position], position, 0);
    }
    int token = PROMPT[position];
    put(token);
    for (int made = 0; made < NEW_TOKENS; made++) {
        token = forward(token, position++, 1);
        put(token);
        if (ends(token)) break;
    }
    call(2, 0, 0, 0);
    return 0;
}
