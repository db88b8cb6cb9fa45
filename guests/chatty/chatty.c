/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Writes its console as fast as it can and rings its bell at every turn, waiting for nobody: the
 * worst neighbour on a host. What the ring has no room for is lost. Words on its command line:
 *
 *   bell    ring only, write nothing
 *   mad     write the ring's indexes at random, too
 */
#include "../common/lib.h"
#include "../common/platform.h"

#include <xen/io/console.h>

static uint32_t random_word(void)
{
    static uint32_t word = 2463534242u;

    word ^= word << 13;
    word ^= word >> 17;
    return word ^= word << 5;
}

static void go_mad(void)
{
    struct xencons_interface *ring = platform.console;
    uint32_t *words[] = {&ring->in_cons, &ring->in_prod, &ring->out_cons, &ring->out_prod};

    *(volatile uint32_t *)words[random_word() % 4] = random_word();
}

void guest_main(void)
{
    const int bell = option("bell") != NULL, mad = option("mad") != NULL;

    print("chatty: here I come\n");
    guest_ready();
    for (unsigned long i = 0;; i++) {
        guest_control();
        if (bell)
            evtchn_notify(platform.console_evtchn);
        else
            print("chatter %lu .......................................................\n", i);
        if (mad && platform.console)
            go_mad();
    }
}

NOXS_ELF_NOTE();
