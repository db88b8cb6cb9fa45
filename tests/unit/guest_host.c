/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Runs guests/daytime as an ordinary process, so that its network stack and noxs.c can be
 * tried and fuzzed under sanitizers. Plays the machine: guest memory is an array, page p at
 * p << 12, and one vif's backend is at the other end of the real rings.
 *
 *   argv[1]  a file with guest pages: u32 pfn, then 4096 bytes, repeated
 *   argv[2]  the pfn of the device page
 *   stdin    commands: u8 code, u32 length, bytes
 *              'F' a frame (first byte: NETRXF flags)   'T' a u64: let so many ns pass
 *              'L' u16: lose the next frames sent       'M' several-slot frame: u16 slot size
 *   stdout   per command the frames sent, each u32 length and bytes, then u32 0
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../guests/common/lib.h"
#include "../../guests/common/platform.h"

#define PAGES   1024
#define GRANTS  2048
#define SLOTS   64
#define BACKEND_PORT 7

static uint8_t memory[PAGES][4096] __attribute__((aligned(4096)));
static struct noxs_grant grants[GRANTS];
static uint64_t now = 5000000000ul;
static uint32_t tx_cons, rx_cons, slot_size = 4096;
static unsigned lose;
static uint32_t tx_pfn, rx_pfn;
static struct shared_info shared;

struct platform platform = {.kind = "test", .shared = &shared, .pages = PAGES};
struct noxs noxs;
int have_noxs, console_patient;

static void *map(uint32_t pfn)
{
    return pfn && pfn < PAGES ? memory[pfn] : NULL;
}

void *noxs_os_map(uint32_t pfn)
{
    return map(pfn);
}

void *noxs_os_page(void)
{
    while (platform.heap < platform.heap_end) {
        uint32_t pfn = platform.heap++;

        if (!noxs_reserved(&noxs, pfn))
            return memory[pfn];
    }
    return NULL;
}

uint32_t noxs_os_frame(const void *page)
{
    return (uint32_t)(((const uint8_t *)page - memory[0]) / 4096);
}

struct noxs_grant *noxs_os_grants(uint32_t *entries)
{
    *entries = GRANTS;
    return grants;
}

void noxs_os_notify(uint32_t port)
{
    (void)port;
}

uint64_t system_time(void)
{
    return now;
}

void print(const char *what, ...)
{
    char line[512];
    va_list arguments;

    va_start(arguments, what);
    vformat(line, sizeof(line), what, arguments);
    va_end(arguments);
    fputs(line, stderr);
}

void guest_ready(void)
{
    noxs_state(&noxs, NOXS_STATE_READY);
}

void guest_control(void)
{
}

int evtchn_take(uint32_t port)
{
    return port == BACKEND_PORT;
}

static uint8_t *granted(uint32_t reference, int writing)
{
    if (reference >= GRANTS || !(grants[reference].flags & 1) || grants[reference].domid != 0 ||
        (writing && (grants[reference].flags & 4)) || grants[reference].frame >= PAGES) {
        fprintf(stderr, "bad grant %u\n", reference);
        abort();
    }
    return memory[grants[reference].frame];
}

static uint32_t *word(uint32_t pfn, unsigned offset)
{
    return (uint32_t *)(memory[pfn] + offset);
}

static void put(const void *bytes, uint32_t length)
{
    fwrite(&length, 4, 1, stdout);
    fwrite(bytes, 1, length, stdout);
}

static void backend_tx(void)
{
    uint32_t prod = *word(tx_pfn, 0);

    for (; tx_cons != prod; tx_cons++) {
        uint8_t *slot = memory[tx_pfn] + SLOTS + tx_cons % 256 * 12;
        uint32_t gref;
        uint16_t offset, flags, id, size;

        memcpy(&gref, slot, 4);
        memcpy(&offset, slot + 4, 2);
        memcpy(&flags, slot + 6, 2);
        memcpy(&id, slot + 8, 2);
        memcpy(&size, slot + 10, 2);
        if (offset + size > 4096 || size < 14 || flags)
            abort();
        if (lose)
            lose--;
        else
            put(granted(gref, 0) + offset, size);
        memcpy(slot, &id, 2);
        memset(slot + 2, 0, 2);
        *word(tx_pfn, 8) = tx_cons + 1;
    }
}

/* Asked for while an answer is put together: the backend works meanwhile, as a real one does. */
uint64_t wall_clock(void)
{
    backend_tx();
    return 1795231381 + now / 1000000000; /* 2026-11-21 03:23:06 UTC at the start */
}

static void backend_rx(const uint8_t *frame, uint32_t length, uint16_t flags)
{
    uint32_t slots = (length + slot_size - 1) / slot_size, prod = *word(rx_pfn, 0);

    if (prod - rx_cons < slots) {
        fprintf(stderr, "no buffers: %u\n", prod - rx_cons);
        return;
    }
    while (length) {
        uint8_t *slot = memory[rx_pfn] + SLOTS + rx_cons % 256 * 8;
        uint16_t part = (uint16_t)(length < slot_size ? length : slot_size), offset = 0, id;
        uint16_t more = length > part ? 4 : 0;
        uint32_t gref;

        memcpy(&id, slot, 2);
        memcpy(&gref, slot + 4, 4);
        memcpy(granted(gref, 1), frame, part);
        flags |= more;
        memcpy(slot, &id, 2);
        memcpy(slot + 2, &offset, 2);
        memcpy(slot + 4, &flags, 2);
        memcpy(slot + 6, &part, 2);
        flags = 0;
        frame += part;
        length -= part;
        rx_cons++;
    }
    *word(rx_pfn, 8) = rx_cons;
}

void evtchn_wait(const uint32_t *ports, unsigned count, uint64_t until)
{
    static uint8_t bytes[70000];
    static uint64_t target;
    uint8_t code;
    uint32_t length, none = 0;

    (void)ports;
    (void)count;
    backend_tx();
    /* Time passes in steps, so that each timer runs at its own time. */
    if (target > now) {
        now = until && until < target ? (until > now ? until : now + 1) : target;
        return;
    }
    fwrite(&none, 4, 1, stdout);
    fflush(stdout);
    if (fread(&code, 1, 1, stdin) != 1)
        exit(0);
    if (fread(&length, 4, 1, stdin) != 1 || length > sizeof(bytes) ||
        fread(bytes, 1, length, stdin) != length)
        exit(2);
    switch (code) {
    case 'F':
        backend_rx(bytes + 1, length - 1, bytes[0]);
        break;
    case 'T': {
        uint64_t step;

        memcpy(&step, bytes, 8);
        target = now + step;
        break;
    }
    case 'L':
        lose = bytes[0];
        break;
    case 'M':
        slot_size = bytes[0] | (uint32_t)bytes[1] << 8;
        break;
    default:
        exit(2);
    }
}

int main(int argc, char **argv)
{
    FILE *pages = fopen(argv[1], "rb");
    struct noxs_vif vif;
    uint32_t pfn;

    (void)argc;
    while (pages && fread(&pfn, 4, 1, pages) == 1)
        if (pfn >= PAGES || fread(memory[pfn], 4096, 1, pages) != 1)
            return 2;
    if (getenv("GUEST_CMDLINE"))
        format(platform.cmdline, sizeof(platform.cmdline), "%s", getenv("GUEST_CMDLINE"));
    platform.heap = 64;
    platform.heap_end = PAGES;
    platform.store = memory[atoi(argv[2])];
    platform.store_evtchn = 1;
    have_noxs = noxs_open(&noxs, platform.store, 1) == 0;
    if (!have_noxs || noxs_vif(&noxs, 0, &vif))
        return 3;
    tx_pfn = vif.queue.tx_pfn;
    rx_pfn = vif.queue.rx_pfn;
    *word(tx_pfn, 4) = *word(tx_pfn, 12) = *word(rx_pfn, 4) = *word(rx_pfn, 12) = 1;
    /* What a toolstack does that posts receive buffers ahead. */
    for (uint32_t k = 0; k < vif.queue.posted_count; k++) {
        uint8_t *slot = memory[rx_pfn] + SLOTS + k * 8;
        uint32_t gref = vif.queue.posted_gref + k;

        grants[gref] = (struct noxs_grant){1, 0, vif.queue.posted_pfn + k};
        memset(slot, 0, 8);
        slot[0] = (uint8_t)k;
        memcpy(slot + 4, &gref, 4);
    }
    *word(rx_pfn, 0) = vif.queue.posted_count;
    /* A frame on the command line arrived before the guest was started. */
    if (argc > 3) {
        static uint8_t early[2048];
        uint32_t length = 0;

        for (const char *at = argv[3]; *at && length < sizeof(early); at += 2) {
            unsigned byte;

            sscanf(at, "%2x", &byte);
            early[length++] = (uint8_t)byte;
        }
        backend_rx(early, length, 0);
    }
    guest_main();
    return 0;
}
