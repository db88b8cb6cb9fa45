/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * An upcall that scribbling let through: go back with events masked. Xen pushed rcx and r11
 * before rip, cs, rflags, rsp and ss; the iret stub of the hypercall page wants a word of
 * flags before rip (struct iret_context in public/arch-x86/xen-x86_64.h).
 */
        .text
        .globl  masking_callback
masking_callback:
        movq    (%rsp), %rcx
        movq    8(%rsp), %r11
        addq    $16, %rsp
        andl    $~0x200, 16(%rsp)
        pushq   $0
        jmp     hypercall_page + 23 * 32

        .section .note.GNU-stack, "", @progbits
