/* SPDX-License-Identifier: BSD-2-Clause */
/* Plays blkback, honest and not, for the disk half of noxs.c. Exits with 0 if all is as it should. */
#undef NDEBUG
#include <assert.h>
#include <string.h>

#include "noxs.h"

static uint8_t ring[4096] __attribute__((aligned(4096)));
static uint8_t data[4096] __attribute__((aligned(4096)));
static struct noxs_grant grants[64];
static unsigned notified;

void *noxs_os_map(uint32_t pfn) { return pfn == 7 ? ring : NULL; }
void *noxs_os_page(void) { return NULL; }
uint32_t noxs_os_frame(const void *page) { return page == data ? 99 : 0; }
void noxs_os_notify(uint32_t evtchn) { notified += evtchn == 5; }

struct noxs_grant *noxs_os_grants(uint32_t *entries)
{
    *entries = 64;
    return grants;
}

static struct noxs noxs;
static struct noxs_disk disk;

static uint32_t *word(unsigned at) { return (uint32_t *)(ring + at); }
static uint8_t *slot(unsigned index) { return ring + 64 + index % 32 * 112; }

static void begin(void)
{
    struct noxs_vbd vbd = {.dev = {.handle = 51712}, .queue = {.evtchn = 5, .ring_pfn = {7}}};

    memset(ring, 0, sizeof(ring));
    memset(grants, 0, sizeof(grants));
    memset(&noxs, 0, sizeof(noxs));
    noxs.header.first_free_gref = 9;
    *word(4) = *word(12) = 1;
    assert(noxs_disk_open(&disk, &noxs, &vbd) == 0);
}

static void answer(uint64_t id, int16_t status)
{
    uint8_t *at = slot(*word(8));

    memcpy(at, &id, 8);
    memcpy(at + 10, &status, 2);
    ++*word(8);
}

static void requests_are_made(void)
{
    uint32_t gref;
    uint64_t sector;
    int status;

    begin();
    assert(noxs_disk_start(&disk, NOXS_DISK_READ, 0, 0, data) == NOXS_EBAD);
    assert(noxs_disk_start(&disk, NOXS_DISK_READ, 0, 9, data) == NOXS_EBAD);
    assert(noxs_disk_start(&disk, NOXS_DISK_WRITE, 77, 8, data) == 0);
    assert(notified == 1 && *word(0) == 1);
    memcpy(&gref, slot(0) + 24, 4);
    memcpy(&sector, slot(0) + 16, 8);
    assert(slot(0)[0] == 1 && slot(0)[1] == 1 && sector == 77 && gref == 9);
    assert(slot(0)[28] == 0 && slot(0)[29] == 7);
    assert(grants[9].flags == 5 && grants[9].frame == 99);
    for (int id = 1; id < 31; id++)
        assert(noxs_disk_start(&disk, NOXS_DISK_READ, 1, 1, data) == id);
    assert(grants[10].flags == 1);
    assert(noxs_disk_start(&disk, NOXS_DISK_FLUSH, 0, 0, NULL) == 31);
    assert(slot(31)[0] == 3 && slot(31)[1] == 0);
    assert(noxs_disk_start(&disk, NOXS_DISK_READ, 1, 1, data) == NOXS_ENOENT);
    assert(noxs_disk_done(&disk, &status) == NOXS_ENOENT && *word(12) == 1);
    answer(31, 0);
    answer(4, -1);
    assert(noxs_disk_done(&disk, &status) == 31 && status == 0);
    assert(noxs_disk_done(&disk, &status) == 4 && status == -1 && disk.errors == 1);
    assert(grants[13].flags == 0);
    assert(noxs_disk_done(&disk, &status) == NOXS_ENOENT && *word(12) == 3);
    assert(noxs_disk_start(&disk, NOXS_DISK_READ, 1, 1, data) == 4);
    assert(grants[13].flags == 1);
}

static void one_lie(uint64_t id, uint32_t answers, uint16_t mapped)
{
    int status;

    begin();
    assert(noxs_disk_start(&disk, NOXS_DISK_READ, 0, 1, data) == 0);
    answer(id, 0);
    *word(8) = answers;
    grants[9].flags |= mapped;
    assert(noxs_disk_done(&disk, &status) == NOXS_EBAD);
}

int main(void)
{
    struct noxs_vbd large = {.queue = {.ring_order = 1, .ring_pfn = {7, 7}}};

    requests_are_made();
    one_lie(1, 1, 0);           /* not asked for */
    one_lie(32, 1, 0);          /* no such request */
    one_lie(1ull << 40, 1, 0);
    one_lie(0, 2, 0);           /* more answers than questions */
    one_lie(0, 0x80000000, 0);
    one_lie(0, 1, 8);           /* it keeps the page */
    assert(noxs_disk_open(&disk, &noxs, &large) == NOXS_EBAD);
    large.queue = (struct noxs_vbd_queue){.ring_pfn = {8}};
    assert(noxs_disk_open(&disk, &noxs, &large) == NOXS_ENOMEM);
    return 0;
}
