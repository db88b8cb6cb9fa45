/* SPDX-License-Identifier: BSD-2-Clause */
/* PV entry and the notes by which a domain builder knows this image (public/elfnote.h). */

#define __ASSEMBLY__
#include <xen/elfnote.h>

        .macro XEN_NOTE type:req, kind:req, value:vararg
        .pushsection .note.Xen, "a", @note
        .balign 4
        .long 4, 2f - 1f, \type
        .asciz "Xen"
1:      \kind \value
2:      .balign 4
        .popsection
        .endm

        XEN_NOTE XEN_ELFNOTE_GUEST_OS,       .asciz, "chaos guest"
        XEN_NOTE XEN_ELFNOTE_GUEST_VERSION,  .asciz, "1"
        XEN_NOTE XEN_ELFNOTE_LOADER,         .asciz, "generic"
        XEN_NOTE XEN_ELFNOTE_XEN_VERSION,    .asciz, "xen-3.0"
        XEN_NOTE XEN_ELFNOTE_FEATURES,       .asciz, "pae_pgdir_above_4gb"
        XEN_NOTE XEN_ELFNOTE_PAE_MODE,       .asciz, "yes"
        XEN_NOTE XEN_ELFNOTE_VIRT_BASE,      .quad,  pv_base
        XEN_NOTE XEN_ELFNOTE_PADDR_OFFSET,   .quad,  pv_base
        XEN_NOTE XEN_ELFNOTE_ENTRY,          .quad,  _start
        XEN_NOTE XEN_ELFNOTE_HYPERCALL_PAGE, .quad,  hypercall_page

        .section .text.start, "ax", @progbits
        .globl  _start
        .type   _start, @function
_start: cld
        movq    %rsp, %rdx              /* the bootstrap stack, the last bootstrap element */
        leaq    boot_stack_end(%rip), %rsp
        xorl    %ebp, %ebp
        movq    %rsi, %rdi              /* struct start_info */
        movq    %rdx, %rsi
        call    platform_start
        ud2
        .size   _start, . - _start

        .section .text.hypercall_page, "ax", @progbits
        .balign 4096
        .globl  hypercall_page
hypercall_page:
        .skip   4096, 0xcc

        .bss
        .balign 4096
        .globl  boot_stack_end
        .skip   32768
boot_stack_end:

        .section .note.GNU-stack, "", @progbits
