/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Computes for ever in integer and vector registers and compares each round with the first
 * one: a host that loses a register, or mixes two guests' up, is caught at it.
 */
#include "../common/lib.h"
#include "../common/platform.h"

#include <xen/sched.h>

typedef uint32_t lanes __attribute__((vector_size(16)));

#define ROUND 100000

static uint64_t integers(uint64_t seed)
{
    uint64_t a = seed, b = ~seed, c = seed * 0x9e3779b97f4a7c15ul, d = seed ^ 0x5555555555555555ul;

    for (unsigned i = 0; i < ROUND; i++) {
        a = (a << 13 | a >> 51) + b;
        b = (b << 29 | b >> 35) ^ c;
        c = c * 0xbf58476d1ce4e5b9ul + d;
        d = (d >> 7 | d << 57) ^ a;
    }
    return a ^ b ^ c ^ d;
}

static uint64_t vectors(uint32_t seed)
{
    lanes v[8], sum = {0};

    for (uint32_t i = 0; i < 8; i++)
        v[i] = (lanes){seed + i, seed ^ i, seed * (i + 1), ~seed - i};
    for (unsigned i = 0; i < ROUND; i++)
        for (unsigned k = 0; k < 8; k++)
            v[k] = (v[k] << 5 ^ v[k] >> 27) + v[(k + 3) & 7];
    for (unsigned k = 0; k < 8; k++)
        sum += v[k] * (k + 1);
    return ((uint64_t)sum[0] << 32 | sum[1]) ^ ((uint64_t)sum[2] << 17 | sum[3]);
}

static uint64_t doubles(double seed)
{
    union {
        double value;
        uint64_t bits;
    } x = {.value = seed};
    double y = seed * 0.5;

    for (unsigned i = 0; i < ROUND / 10; i++) {
        x.value = x.value * 0.999 + y / 3.0;
        y = y * 1.001 - x.value * 0.25;
    }
    return x.bits;
}

void guest_main(void)
{
    const uint64_t first[3] = {integers(42), vectors(42), doubles(42)};
    uint64_t start = system_time(), rounds, errors = 0, next = start + 1000000000;

    print("spin: sums %lx %lx %lx\n", first[0], first[1], first[2]);
    guest_ready();
    for (rounds = 0;; rounds++) {
        const uint64_t sums[3] = {integers(42), vectors(42), doubles(42)};

        guest_control();
        for (unsigned i = 0; i < 3; i++)
            if (sums[i] != first[i]) {
                errors++;
                print("spin: CORRUPT after %lu rounds: sum %u is %lx, was %lx\n", rounds, i,
                      sums[i], first[i]);
            }
        if (system_time() >= next) {
            next += 10000000000ul;
            print("spin: %lu rounds in %lu s, %lu errors\n", rounds,
                  (system_time() - start) / 1000000000, errors);
        }
    }
}

NOXS_ELF_NOTE();
