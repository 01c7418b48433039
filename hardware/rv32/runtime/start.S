# Switch the FPU on (mstatus.FS), set the stack, go to main. memcpy and memset are here because a compiler may call them unasked.

    .section .text.start, "ax"
    .globl _start
_start:
    li t0, 0x2000
    csrs mstatus, t0
    la sp, __stack_top
    call main
stop:
    j stop

    .text
    .globl memcpy
memcpy:
    mv t0, a0
    beqz a2, 2f
1:  lbu t1, 0(a1)
    sb t1, 0(t0)
    addi a1, a1, 1
    addi t0, t0, 1
    addi a2, a2, -1
    bnez a2, 1b
2:  ret

    .globl memset
memset:
    mv t0, a0
    beqz a2, 2f
1:  sb a1, 0(t0)
    addi t0, t0, 1
    addi a2, a2, -1
    bnez a2, 1b
2:  ret

    .section .weights, "a"
    .globl weights
    .balign 16
weights:
    .incbin "weights.bin"
