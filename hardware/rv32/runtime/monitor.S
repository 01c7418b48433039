/* What Spike and QEMU start with. It lies outside the chip's memories, locks all other addresses, starts the program, and
 * does for its calls what unicorn's host does. board.S, which includes it, is written for each chip.
 *
 * It sends the host lines of five words in hexadecimal: for a call its number, a0, a1 and a2; for any other trap 0x100 +
 * mcause, mepc, mtval and 0; at the end 3 and the bytes of stack. The fifth word counts the instructions since the last
 * line, of which seven are the monitor's own. */

    .equ T1, 0
    .equ T2, 4
    .equ T3, 8
    .equ T4, 12
    .equ T5, 16
    .equ A0, 20
    .equ A1, 24
    .equ LAST, 28
    .equ WORDS, 32
    .equ TEXT, 52
    .equ REQUEST, 128

    .section .monitor, "ax"
    .globl _start
_start:
    la t0, trap
    csrw mtvec, t0
    la t0, state
    csrw mscratch, t0
    li t1, WORKING          /* what differs from FILL at the end was written */
    li t2, WORKING_END
    li t3, FILL
1:  sw t3, 0(t1)
    addi t1, t1, 4
    bne t1, t2, 1b
    jal t5, lock
    li t1, 0x1800           /* mret stays in machine mode, where no address is free */
    csrs mstatus, t1
    li t1, ENTRY
    csrw mepc, t1
    j leave

    .balign 4
trap:
    csrrw t0, mscratch, t0
    sw t1, T1(t0)
    csrr t1, minstret
    sw t2, T2(t0)
    sw t3, T3(t0)
    sw t4, T4(t0)
    sw t5, T5(t0)
    sw a0, A0(t0)
    sw a1, A1(t0)
    lw t2, LAST(t0)
    sub t1, t1, t2
    sw t1, WORDS+16(t0)
    csrr t1, mcause
    addi t2, t1, -11        /* a call from machine mode */
    bnez t2, fault
    sw a7, WORDS(t0)
    sw a0, WORDS+4(t0)
    sw a1, WORDS+8(t0)
    sw a2, WORDS+12(t0)
    jal t5, send
    addi t1, a7, -1
    bnez t1, end
    csrr t1, mepc
    addi t1, t1, 4
    csrw mepc, t1
leave:
    lw t2, T2(t0)
    lw t3, T3(t0)
    lw t4, T4(t0)
    lw t5, T5(t0)
    lw a0, A0(t0)
    lw a1, A1(t0)
    csrr t1, minstret
    sw t1, LAST(t0)
    lw t1, T1(t0)
    csrrw t0, mscratch, t0
    mret

fault:
    addi t1, t1, 0x100
    sw t1, WORDS(t0)
    csrr t1, mepc
    sw t1, WORDS+4(t0)
    csrr t1, mtval
    sw t1, WORDS+8(t0)
    sw zero, WORDS+12(t0)
    jal t5, send
    j finish

end:                        /* the working memory is written from its end down */
    li t1, WORKING
    li t2, WORKING_END
    li t3, FILL & 0xff
1:  lbu t4, 0(t1)
    bne t4, t3, 2f
    addi t1, t1, 1
    bne t1, t2, 1b
2:  sub t2, t2, t1
    sw t2, WORDS+4(t0)
    li t1, 3
    sw t1, WORDS(t0)
    jal t5, send
    j finish

send:                       /* the five words; returns to t5 */
    addi t1, t0, WORDS
    addi t2, t0, TEXT
1:  lw t3, 0(t1)
    li t4, 8
2:  srli a0, t3, 28
    slli t3, t3, 4
    addi a1, a0, -10
    bltz a1, 3f
    addi a0, a0, 'a' - '0' - 10
3:  addi a0, a0, '0'
    sb a0, 0(t2)
    addi t2, t2, 1
    addi t4, t4, -1
    bnez t4, 2b
    li a0, ' '
    sb a0, 0(t2)
    addi t2, t2, 1
    addi t1, t1, 4
    addi a0, t0, TEXT
    bne t1, a0, 1b
    li a0, '\n'
    sb a0, -1(t2)
    sb zero, 0(t2)

#ifdef SPIKE                /* the host's calls: a request of eight double words, here a write to standard output */
    addi a1, t0, REQUEST
    li a0, 64
    sw a0, 0(a1)
    li a0, 1
    sw a0, 8(a1)
    addi a0, t0, TEXT
    sw a0, 16(a1)
    li a0, 45
    sw a0, 24(a1)
    la a0, tohost
    sw a1, 0(a0)
1:  lw a1, 8(a0)
    beqz a1, 1b
    sw zero, 8(a0)
    jr t5

finish:
    la a0, tohost
    li a1, 1
    sw a1, 0(a0)
1:  j 1b

    .section .state, "aw"
    .balign 8
    .globl tohost, fromhost
tohost:
    .dword 0
fromhost:
    .dword 0
#else                       /* semihosting, whose instruction is these three */
    addi a1, t0, TEXT
    li a0, 4                /* write a text that ends with a zero */
    .balign 16
    slli zero, zero, 0x1f
    ebreak
    srai zero, zero, 7
    jr t5

finish:
    li a0, 0x18             /* exit */
    li a1, 0x20026
    .balign 16
    slli zero, zero, 0x1f
    ebreak
    srai zero, zero, 7
1:  j 1b

    .section .state, "aw"
#endif
    .balign 8
state:
    .zero 256
