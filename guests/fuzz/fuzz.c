/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * A hostile guest: it scribbles over every byte that it shares with the host, and rings every
 * doorbell, over and over. Nobody but itself may be hurt.
 *
 *   seed=N     what the scribbling starts from (1)
 *   rounds=N   how often (1000)
 *   spare=WORD[,WORD]  leave alone: page, console, rings, grants, shared
 *   close      close the event channels at last
 *   end=WORD   poweroff (default), crash, or sleep with everything as it is
 */
#include "../common/hypercall.h"
#include "../common/lib.h"
#include "../common/platform.h"

#include <xen/io/console.h>
#include <xen/sched.h>

#define REGIONS 256
#define PORTS   256

struct region {
    uint8_t *start;
    const char *kind;
};

static struct region regions[REGIONS];
static unsigned region_count;
static uint32_t ports[PORTS];
static unsigned port_count;
static uint64_t state;

static uint64_t random(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state * 0x2545f4914f6cdd1dul;
}

static int spared(const char *kind)
{
    const char *at = option("spare");
    size_t length = strlen(kind);

    for (; at && *at && *at != ' '; at++)
        if (!memcmp(at, kind, length))
            return 1;
    return 0;
}

static void add_region(const char *kind, void *start)
{
    if (!start || region_count == REGIONS || spared(kind))
        return;
    regions[region_count].kind = kind;
    regions[region_count++].start = start;
}

static void add_port(uint32_t port)
{
    if (port && port_count < PORTS)
        ports[port_count++] = port;
}

static void find_victims(void)
{
    struct noxs_vif vif;
    struct noxs_vbd vbd;
    uint32_t entries = 0, pfn;
    uint8_t *grants = platform.map_grants(&entries);

    add_region("page", platform.store);
    add_region("console", platform.console);
    add_region("shared", platform.shared);
    for (uint32_t i = 0; grants && i < entries * sizeof(struct noxs_grant) / NOXS_PAGE_SIZE; i++)
        add_region("grants", grants + i * NOXS_PAGE_SIZE);
    add_port(platform.store_evtchn);
    add_port(platform.console_evtchn);
    for (uint32_t i = 1; have_noxs && i < noxs.header.pages; i++)
        if (!noxs_read(&noxs, NOXS_MORE_PAGES_OFFSET + 4 * (i - 1), &pfn, sizeof(pfn)))
            add_region("page", platform.map(pfn));
    for (uint32_t i = 0; have_noxs && noxs_vif(&noxs, i, &vif) == 0; i++)
        for (uint32_t q = 0; q < vif.dev.queues; q++) {
            struct noxs_vif_queue queue;

            if (noxs_vif_queue(&noxs, &vif, q, &queue))
                continue;
            add_region("rings", platform.map(queue.tx_pfn));
            add_region("rings", platform.map(queue.rx_pfn));
            for (uint32_t k = 0; k < queue.posted_count && k < NOXS_MAX_POSTED; k++)
                add_region("rings", platform.map(queue.posted_pfn + k));
            add_port(queue.tx_evtchn);
            add_port(queue.rx_evtchn);
        }
    for (uint32_t i = 0; have_noxs && noxs_vbd(&noxs, i, &vbd) == 0; i++) {
        for (uint32_t p = 0; p < 1u << (vbd.queue.ring_order & 3) && p < 4; p++)
            add_region("rings", platform.map(vbd.queue.ring_pfn[p]));
        add_port(vbd.queue.evtchn);
    }
}

/* One way or another, over a part of the page or all of it. */
static void scribble(const struct region *victim)
{
    uint32_t from = 0, to = NOXS_PAGE_SIZE, count;
    uint64_t r = random();

    if (r & 1) {
        from = (uint32_t)(r >> 8) % NOXS_PAGE_SIZE;
        to = from + 1 + (uint32_t)(r >> 24) % (NOXS_PAGE_SIZE - from);
    }
    switch ((r >> 1) % 8) {
    case 0: /* noise */
        for (uint32_t i = from; i < to; i++)
            victim->start[i] = (uint8_t)random();
        break;
    case 1: /* one value */
        memset(victim->start + from, (int)random(), to - from);
        break;
    case 2: /* flipped bits */
        for (count = 1 + random() % 64; count; count--)
            victim->start[from + random() % (to - from)] ^= (uint8_t)(1u << random() % 8);
        break;
    case 3: /* words that programs trip over, on their boundaries */
        for (count = 1 + random() % 64; count; count--) {
            static const uint32_t odd[] = {0, 1, 0x7fffffff, 0x80000000, 0xffffffff,
                                           0xfffffffe, 0xffff, 0x10000, 0x1000, NOXS_MAGIC};
            uint32_t at = (uint32_t)(random() % (NOXS_PAGE_SIZE / 4)) * 4;

            *(volatile uint32_t *)(victim->start + at) = odd[random() % 10];
        }
        break;
    case 4: /* words off by a little: indices, lengths, states */
        for (count = 1 + random() % 64; count; count--) {
            uint32_t at = (uint32_t)(random() % (NOXS_PAGE_SIZE / 4)) * 4;

            *(volatile uint32_t *)(victim->start + at) += (uint32_t)(random() % 9) - 4;
        }
        break;
    case 5: /* another victim's bytes */
        memmove(victim->start + from, regions[random() % region_count].start + from, to - from);
        break;
    case 6: /* the guest's words, as if it meant them */
        for (uint32_t i = 0; i < 7; i++)
            *(volatile uint32_t *)(victim->start + NOXS_GUEST_OFFSET + 4 * i) =
                random() & 1 ? (uint32_t)random() % 8 : (uint32_t)random();
        break;
    default: /* the first words, where rings keep their indices; and the console's */
        for (uint32_t i = 0; i < 4; i++) {
            *(volatile uint32_t *)(victim->start + 4 * i) = (uint32_t)random();
            *(volatile uint32_t *)(victim->start + 3072 + 4 * i) = (uint32_t)random();
        }
    }
}

static void close_port(uint32_t port)
{
    struct evtchn_close close = {.port = port};

    hypercall2(__HYPERVISOR_event_channel_op, EVTCHNOP_close, (uint64_t)&close);
}

void guest_main(void)
{
    long rounds = option_number("rounds", 1000);
    char end[16];

    state = (uint64_t)option_number("seed", 1) * 0x9e3779b97f4a7c15ul | 1;
    find_victims();
    platform.mask_events();
    print("noxs-fuzz: seed %ld, %ld rounds over %u pages and %u event channels\n",
          option_number("seed", 1), rounds, region_count, port_count);
    guest_ready();
    option_text("end", end, sizeof(end));
    for (long round = 0; region_count && round < rounds; round++) {
        for (unsigned i = 0; i < region_count; i++)
            if (rounds < 10 || random() & 1)
                scribble(&regions[i]);
        for (unsigned i = 0; i < port_count; i++)
            if (random() & 1)
                evtchn_notify(ports[i]);
        if (random() % 16 == 0)
            evtchn_wait(NULL, 0, 1 + (random() & 1));
    }
    for (unsigned i = 0; option("close") && i < port_count; i++)
        close_port(ports[i]);
    if (end[0] == 'c')
        shutdown(SHUTDOWN_crash);
    if (end[0] == 's')
        for (;;)
            evtchn_wait(NULL, 0, 0);
    shutdown(SHUTDOWN_poweroff);
}

NOXS_ELF_NOTE();
