/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Writes sectors of each disk, reads them back, checks them, prints what came of it, says ready.
 * Words on its command line:
 *
 *   sectors=N   of the first sectors of each disk (64)
 *   keep        write nothing: what another run wrote must be there
 *   busy        after ready go on writing, with as many requests under way as the ring holds
 *
 * A sector starts with the text "sector N of disk HANDLE", and the rest of it depends on N.
 */
#include "../common/lib.h"
#include "../common/platform.h"

#include <xen/sched.h>

#define PER_PAGE (NOXS_PAGE_SIZE / NOXS_SECTOR)

static struct noxs_disk disk;
static uint8_t *buffer[NOXS_DISK_RING];
static uint64_t first[NOXS_DISK_RING];  /* of a buffer's sectors */
static uint32_t count[NOXS_DISK_RING];  /* 0: the buffer is free */
static uint32_t owner[NOXS_DISK_RING];  /* request -> buffer */

static void fill(uint8_t *sector, uint64_t number)
{
    size_t length = format((char *)sector, NOXS_SECTOR, "sector %lu of disk %u\n", number,
                           disk.vbd.dev.handle);

    for (size_t i = length; i < NOXS_SECTOR; i++)
        sector[i] = (uint8_t)(number * 31 + i);
}

static uint32_t wrong(const uint8_t *page, uint64_t from, uint32_t sectors)
{
    static uint8_t wanted[NOXS_SECTOR];
    uint32_t bad = 0;

    for (uint32_t i = 0; i < sectors; i++) {
        fill(wanted, from + i);
        bad += memcmp(wanted, page + i * NOXS_SECTOR, NOXS_SECTOR) != 0;
    }
    return bad;
}

static void fail(const char *what)
{
    char message[NOXS_MAX_MESSAGE];

    format(message, sizeof(message), "disk %u: %s", disk.vbd.dev.handle, what);
    print("%s\n", message);
    guest_exit(SHUTDOWN_crash, 1, message);
}

static void sleep_for_disk(void)
{
    const uint32_t ports[] = {disk.vbd.queue.evtchn, platform.store_evtchn};

    evtchn_wait(ports, 2, 0);
    evtchn_take(disk.vbd.queue.evtchn);
    guest_control();
}

/* The next request that is done; its buffer. */
static uint32_t await(int *status)
{
    int id;

    while ((id = noxs_disk_done(&disk, status)) == NOXS_ENOENT)
        sleep_for_disk();
    if (id < 0)
        fail("the ring is not to be believed");
    return owner[id];
}

/* One request of which nothing else is under way; its status. */
static int once(uint32_t operation, uint64_t sector, uint32_t sectors)
{
    int status, id = noxs_disk_start(&disk, operation, sector, sectors, buffer[0]);

    if (id < 0)
        fail("a request cannot be made");
    owner[id] = 0;
    await(&status);
    return status;
}

/* Sectors 0 to total - 1, many requests at once; how many requests failed. *bad: sectors. */
static uint32_t transfer(uint32_t operation, uint64_t total, uint32_t *bad)
{
    uint32_t under_way = 0, failed = 0, free = 0;
    uint64_t next = 0;

    while (next < total || under_way) {
        int status, id = NOXS_ENOENT;
        uint32_t at;

        if (next < total && under_way < NOXS_DISK_RING) {
            while (count[free])
                free = (free + 1) % NOXS_DISK_RING;
            count[free] = total - next < PER_PAGE ? (uint32_t)(total - next) : PER_PAGE;
            first[free] = next;
            for (uint32_t i = 0; operation == NOXS_DISK_WRITE && i < count[free]; i++)
                fill(buffer[free] + i * NOXS_SECTOR, next + i);
            id = noxs_disk_start(&disk, operation, next, count[free], buffer[free]);
            if (id < 0)
                fail("a request cannot be made");
            owner[id] = free;
            next += count[free];
            under_way++;
            continue;
        }
        at = await(&status);
        if (status)
            failed++;
        else if (operation == NOXS_DISK_READ)
            *bad += wrong(buffer[at], first[at], count[at]);
        count[at] = 0;
        under_way--;
    }
    return failed;
}

static void check(uint64_t sectors)
{
    uint64_t size = disk.vbd.sectors;
    int readonly = (disk.vbd.info & 4) != 0, writes = !readonly && !option("keep");
    uint32_t bad = 0, failed = 0;

    print("disk %u: %lu sectors, %s, features %x\n", disk.vbd.dev.handle, size,
          readonly ? "read-only" : "read-write", disk.vbd.dev.features);
    if (sectors > size)
        sectors = size;
    if (writes) {
        failed += transfer(NOXS_DISK_WRITE, sectors, &bad);
        if (disk.vbd.dev.features & NOXS_VBD_FLUSH)
            failed += once(NOXS_DISK_FLUSH, 0, 0) != 0;
    }
    for (uint32_t i = 0; i < NOXS_DISK_RING; i++)
        memset(buffer[i], 0, NOXS_PAGE_SIZE);
    failed += transfer(NOXS_DISK_READ, sectors, &bad);
    print("disk %u: %s %lu sectors, %u wrong, %u requests failed\n", disk.vbd.dev.handle,
          writes ? "wrote and read" : "read", sectors, bad, failed);
    if (bad || failed)
        fail("it does not hold what was written");
    if (!once(NOXS_DISK_READ, size, 1))
        fail("a sector beyond its end was read");
    if (readonly && !once(NOXS_DISK_WRITE, 0, 1))
        fail("it is read-only and was written");
}

void guest_main(void)
{
    uint64_t sectors = (uint64_t)option_number("sectors", 64);
    struct noxs_vbd vbd;
    unsigned disks = 0;

    console_patient = 1;
    for (uint32_t i = 0; i < NOXS_DISK_RING; i++) {
        buffer[i] = noxs_os_page();
        if (!buffer[i])
            guest_exit(SHUTDOWN_crash, 1, "out of memory");
    }
    for (; have_noxs && noxs_vbd(&noxs, disks, &vbd) == 0; disks++) {
        if (noxs_disk_open(&disk, &noxs, &vbd))
            guest_exit(SHUTDOWN_crash, 1, "a disk cannot be opened");
        check(sectors);
    }
    print("%u disks are sound\n", disks);
    guest_ready();
    for (uint32_t bad = 0; disks && option("busy");)
        transfer(NOXS_DISK_WRITE, sectors, &bad);
    for (;;) {
        guest_control();
        evtchn_wait(&platform.store_evtchn, 1, 0);
    }
}

NOXS_ELF_NOTE();
