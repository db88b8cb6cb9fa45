/* SPDX-License-Identifier: BSD-2-Clause */
/* What little of a C library the guests need. */
#ifndef LIB_H
#define LIB_H

#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

void *memcpy(void *to, const void *from, size_t length);
void *memmove(void *to, const void *from, size_t length);
void *memset(void *to, int byte, size_t length);
int memcmp(const void *a, const void *b, size_t length);
size_t strlen(const char *text);

/* %s %c %d %u %x with l, ll, z, widths and a leading 0; returns the length without the NUL. */
size_t format(char *to, size_t size, const char *what, ...)
    __attribute__((format(printf, 3, 4)));
size_t vformat(char *to, size_t size, const char *what, va_list arguments);

/* The value of "key=value" on the kernel command line ("" for a bare "key"), or NULL. */
const char *option(const char *key);
/* The same as a number; what is no number reads as 0. */
long option_number(const char *key, long otherwise);
/* Copies an option's value, up to the next blank. */
size_t option_text(const char *key, char *to, size_t size);

#endif
