/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * PVH entry (docs/misc/pvh.pandoc in Xen's tree): 32-bit protected mode, no paging, %ebx holds
 * the address of struct hvm_start_info. Maps the first 4 GiB onto themselves, all but page 0,
 * and goes on in 64-bit mode.
 */

#define PRESENT_WRITABLE 0x03
#define LARGE            0x80

#define CR0_PE  (1 << 0)
#define CR0_MP  (1 << 1)
#define CR0_NE  (1 << 5)
#define CR0_WP  (1 << 16)
#define CR0_PG  (1 << 31)
#define CR4_PAE (1 << 5)
#define CR4_OSFXSR     (1 << 9)
#define CR4_OSXMMEXCPT (1 << 10)
#define MSR_EFER 0xc0000080
#define EFER_LME (1 << 8)

        .pushsection .note.Xen, "a", @note
        .balign 4
        .long   4, 4, 18                /* XEN_ELFNOTE_PHYS32_ENTRY */
        .asciz  "Xen"
        .long   pvh_start
        .popsection

        .section .text.start, "ax", @progbits
        .code32
        .globl  pvh_start
        .type   pvh_start, @function
pvh_start:
        cld
        movl    $boot_stack_end, %esp

        movl    $level3 + PRESENT_WRITABLE, level4
        movl    $level2 + PRESENT_WRITABLE, %eax
        movl    $level3, %edi
        movl    $4, %ecx
1:      movl    %eax, (%edi)
        addl    $4096, %eax
        addl    $8, %edi
        loop    1b

        movl    $LARGE | PRESENT_WRITABLE, %eax
        movl    $level2, %edi
        movl    $4 * 512, %ecx
2:      movl    %eax, (%edi)
        addl    $0x200000, %eax
        addl    $8, %edi
        loop    2b

        movl    $level1 + PRESENT_WRITABLE, level2
        movl    $0x1000 | PRESENT_WRITABLE, %eax
        movl    $level1 + 8, %edi
        movl    $511, %ecx
3:      movl    %eax, (%edi)
        addl    $0x1000, %eax
        addl    $8, %edi
        loop    3b

        movl    $CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT, %eax
        movl    %eax, %cr4
        movl    $level4, %eax
        movl    %eax, %cr3
        movl    $MSR_EFER, %ecx
        rdmsr
        orl     $EFER_LME, %eax
        wrmsr
        movl    $CR0_PE | CR0_MP | CR0_NE | CR0_WP | CR0_PG, %eax
        movl    %eax, %cr0
        lgdt    gdt_pointer
        ljmp    $0x08, $4f

        .code64
4:      movl    $0x10, %eax
        movl    %eax, %ds
        movl    %eax, %es
        movl    %eax, %ss
        xorl    %ebp, %ebp
        movl    %ebx, %edi
        call    platform_start_pvh
        ud2
        .size   pvh_start, . - pvh_start

        .section .text.fault, "ax", @progbits
        .globl  fault_entry
fault_entry:
        andq    $-16, %rsp
        call    platform_fault
        ud2

        .section .rodata.gdt, "a", @progbits
        .balign 8
gdt:    .quad   0
        .quad   0x00af9b000000ffff      /* 64-bit code */
        .quad   0x00cf93000000ffff      /* data */
gdt_pointer:
        .word   . - gdt - 1
        .long   gdt

        .bss
        .balign 4096
level4: .skip   4096
level3: .skip   4096
level2: .skip   4 * 4096
level1: .skip   4096

        .section .note.GNU-stack, "", @progbits
