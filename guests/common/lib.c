/* SPDX-License-Identifier: BSD-2-Clause */
#include "lib.h"

#include "platform.h"

/* gcc turns loops into calls of these very functions unless told not to. */
#define NO_LOOP_TO_CALL __attribute__((optimize("no-tree-loop-distribute-patterns")))

void *memcpy(void *to, const void *from, size_t length)
{
    void *start = to;

    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(length) : : "memory");
    return start;
}

NO_LOOP_TO_CALL void *memmove(void *to, const void *from, size_t length)
{
    uint8_t *t = to;
    const uint8_t *f = from;

    if (t <= f || t >= f + length)
        return memcpy(to, from, length);
    while (length--)
        t[length] = f[length];
    return to;
}

void *memset(void *to, int byte, size_t length)
{
    void *start = to;

    __asm__ volatile("rep stosb" : "+D"(to), "+c"(length) : "a"(byte) : "memory");
    return start;
}

NO_LOOP_TO_CALL int memcmp(const void *a, const void *b, size_t length)
{
    const uint8_t *x = a, *y = b;

    for (; length--; x++, y++)
        if (*x != *y)
            return *x - *y;
    return 0;
}

NO_LOOP_TO_CALL size_t strlen(const char *text)
{
    size_t length = 0;

    while (text[length])
        length++;
    return length;
}

struct output {
    char *to;
    size_t size, used;
};

static void put(struct output *out, char c)
{
    if (out->used + 1 < out->size)
        out->to[out->used] = c;
    out->used++;
}

static void put_number(struct output *out, uint64_t value, unsigned base, int negative,
                       unsigned width, char pad)
{
    char digits[24];
    unsigned count = 0;

    do {
        digits[count++] = "0123456789abcdef"[value % base];
        value /= base;
    } while (value);
    if (negative)
        digits[count++] = '-';
    for (; width > count; width--)
        put(out, pad);
    while (count)
        put(out, digits[--count]);
}

size_t vformat(char *to, size_t size, const char *what, va_list arguments)
{
    struct output out = {to, size, 0};

    for (; *what; what++) {
        unsigned width = 0, longs = 0;
        char pad = ' ';

        if (*what != '%') {
            put(&out, *what);
            continue;
        }
        what++;
        if (*what == '0')
            pad = '0';
        for (; *what >= '0' && *what <= '9'; what++)
            width = width * 10 + (unsigned)(*what - '0');
        for (; *what == 'l' || *what == 'z'; what++)
            longs++;
        switch (*what) {
        case 'd': {
            int64_t value = longs ? va_arg(arguments, long) : va_arg(arguments, int);
            put_number(&out, value < 0 ? -(uint64_t)value : (uint64_t)value, 10, value < 0,
                       width, pad);
            break;
        }
        case 'u':
        case 'x': {
            uint64_t value =
                longs ? va_arg(arguments, unsigned long) : va_arg(arguments, unsigned);
            put_number(&out, value, *what == 'x' ? 16 : 10, 0, width, pad);
            break;
        }
        case 'c':
            put(&out, (char)va_arg(arguments, int));
            break;
        case 's':
            for (const char *s = va_arg(arguments, const char *); *s; s++)
                put(&out, *s);
            break;
        case '\0':
            what--;
            break;
        default:
            put(&out, *what);
        }
    }
    if (size)
        to[out.used < size ? out.used : size - 1] = '\0';
    return out.used;
}

size_t format(char *to, size_t size, const char *what, ...)
{
    va_list arguments;
    size_t length;

    va_start(arguments, what);
    length = vformat(to, size, what, arguments);
    va_end(arguments);
    return length;
}

const char *option(const char *key)
{
    size_t length = strlen(key);
    const char *at = platform.cmdline;

    while (*at) {
        if (!memcmp(at, key, length)) {
            if (at[length] == '=')
                return at + length + 1;
            if (at[length] == ' ' || at[length] == '\0')
                return "";
        }
        while (*at && *at != ' ')
            at++;
        while (*at == ' ')
            at++;
    }
    return NULL;
}

long option_number(const char *key, long otherwise)
{
    const char *at = option(key);
    long value = 0;
    int negative;

    if (!at)
        return otherwise;
    negative = *at == '-';
    for (at += negative; *at >= '0' && *at <= '9'; at++)
        value = value * 10 + (*at - '0');
    return negative ? -value : value;
}

size_t option_text(const char *key, char *to, size_t size)
{
    const char *at = option(key);
    size_t used = 0;

    for (; at && *at && *at != ' ' && used + 1 < size; at++)
        to[used++] = *at;
    to[used] = '\0';
    return used;
}
