/* SPDX-License-Identifier: BSD-2-Clause */
/* Hypercalls through the hypercall page: 32 bytes of code each (public/arch-x86/xen-x86_64.h). */
#ifndef HYPERCALL_H
#define HYPERCALL_H

#include <stdint.h>
#include <xen/xen.h>

extern char hypercall_page[];

static inline long hypercall4(unsigned nr, uint64_t a, uint64_t b, uint64_t c, uint64_t d)
{
    register uint64_t fourth __asm__("r10") = d;
    long result;

    __asm__ volatile("call *%[entry]"
                     : "=a"(result), "+D"(a), "+S"(b), "+d"(c), "+r"(fourth)
                     : [entry] "a"(hypercall_page + 32 * nr)
                     : "rcx", "r8", "r9", "r11", "memory");
    return result;
}

static inline long hypercall2(unsigned nr, uint64_t a, uint64_t b)
{
    return hypercall4(nr, a, b, 0, 0);
}

static inline long hypercall3(unsigned nr, uint64_t a, uint64_t b, uint64_t c)
{
    return hypercall4(nr, a, b, c, 0);
}

#endif
