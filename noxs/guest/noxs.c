/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * noxs for unikernels: the device page, the toolstack's requests, the metadata, grants and
 * vifs, vbds. noxs.h says what it does and what it needs.
 *
 * The toolstack and the backends are trusted no further than memory safety asks: every
 * number that comes from shared memory is read once and checked before it is used.
 */
#include "noxs.h"

#define PAGE NOXS_PAGE_SIZE

void *memcpy(void *to, const void *from, size_t length);
void *memset(void *to, int byte, size_t length);

static inline void full_barrier(void)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

static inline uint32_t load(const volatile void *at)
{
    return __atomic_load_n((const volatile uint32_t *)at, __ATOMIC_ACQUIRE);
}

static inline void store(volatile void *at, uint32_t value)
{
    __atomic_store_n((volatile uint32_t *)at, value, __ATOMIC_RELEASE);
}

/* ---- The page -------------------------------------------------------------------- */

/* How often a page under change is looked at before giving up: a toolstack may die midway. */
#define PATIENCE 10000000u

static volatile uint8_t *area_page(struct noxs *n, uint32_t index)
{
    uint32_t pfn;

    if (!index)
        return n->area[0];
    if (index >= n->header.pages)
        return NULL;
    pfn = load(n->area[0] + NOXS_MORE_PAGES_OFFSET + 4 * (index - 1));
    if (!n->area[index] || n->area_pfn[index] != pfn) {
        n->area[index] = noxs_os_map(pfn);
        n->area_pfn[index] = pfn;
    }
    return n->area[index];
}

static int copy(struct noxs *n, uint32_t offset, uint8_t *to, uint32_t length)
{
    while (length) {
        uint32_t within = offset % PAGE, part = PAGE - within;
        volatile uint8_t *page = area_page(n, offset / PAGE);

        if (!page)
            return NOXS_EBAD;
        if (part > length)
            part = length;
        memcpy(to, (const uint8_t *)page + within, part);
        to += part;
        offset += part;
        length -= part;
    }
    return 0;
}

int noxs_read(struct noxs *n, uint32_t offset, void *to, uint32_t length)
{
    volatile uint8_t *generation = n->area[0] + offsetof(struct noxs_header, generation);

    if (offset > NOXS_MAX_PAGES * PAGE || length > NOXS_MAX_PAGES * PAGE)
        return NOXS_EBAD;
    for (uint32_t tries = 0; tries < PATIENCE; tries++) {
        uint32_t before = load(generation);

        if (!(before & 1)) {
            int error = copy(n, offset, to, length);

            __atomic_thread_fence(__ATOMIC_ACQUIRE);
            if (load(generation) == before)
                return error;
        }
        __asm__ volatile("" : : : "memory");
    }
    return NOXS_EBAD;
}

int noxs_reread(struct noxs *n)
{
    struct noxs_header header;
    uint64_t end;
    int error = noxs_read(n, 0, &header, sizeof(header));

    if (error)
        return error;
    if (header.magic != NOXS_MAGIC)
        return NOXS_ENOPAGE;
    if (header.abi_major != NOXS_ABI_MAJOR)
        return NOXS_EABI;
    end = (uint64_t)header.pages * PAGE;
    if (!header.pages || header.pages > NOXS_MAX_PAGES ||
        header.header_size < sizeof(header) || header.device_count > NOXS_MAX_DEVICES ||
        header.slot_size < NOXS_SLOT_SIZE ||
        (uint64_t)header.devices_offset + header.device_count * header.slot_size > end ||
        header.metadata_length > NOXS_MAX_METADATA ||
        (uint64_t)header.metadata_offset + header.metadata_length > end ||
        header.extent_count > NOXS_MAX_EXTENTS)
        return NOXS_EBAD;
    header.name[NOXS_MAX_NAME] = '\0';
    n->header = header;
    return 0;
}

static volatile struct noxs_guest *words(struct noxs *n)
{
    return (volatile struct noxs_guest *)(n->area[0] + NOXS_GUEST_OFFSET);
}

int noxs_open(struct noxs *n, void *page, uint32_t evtchn)
{
    int error;

    memset(n, 0, sizeof(*n));
    n->area[0] = page;
    n->evtchn = evtchn;
    if (load(n->area[0]) != NOXS_MAGIC)
        return NOXS_ENOPAGE;
    error = noxs_reread(n);
    if (!error)
        store(&words(n)->abi, NOXS_ABI_VERSION);
    return error;
}

void noxs_message(struct noxs *n, const char *text, size_t length)
{
    volatile struct noxs_guest *guest = words(n);

    if (length > NOXS_MAX_MESSAGE)
        length = NOXS_MAX_MESSAGE;
    store(&guest->message_length, 0);
    for (size_t i = 0; i < length; i++)
        guest->message[i] = text[i];
    store(&guest->message_length, (uint32_t)length);
}

void noxs_exit_code(struct noxs *n, int32_t code)
{
    store(&words(n)->exit_code, (uint32_t)code);
}

void noxs_state(struct noxs *n, uint32_t state)
{
    store(&words(n)->state, state);
    noxs_os_notify(n->evtchn);
}

void noxs_accepts(struct noxs *n, uint32_t mask)
{
    store(&words(n)->accepts, mask);
}

uint32_t noxs_request(struct noxs *n, uint32_t *argument)
{
    volatile struct noxs_request *request =
        (volatile struct noxs_request *)(n->area[0] + NOXS_REQUEST_OFFSET);
    uint32_t seq = load(&request->seq);

    if (seq == n->seen)
        return NOXS_REQUEST_NONE;
    n->seen = seq;
    if (argument)
        *argument = load(&request->argument);
    return load(&request->code);
}

void noxs_acknowledge(struct noxs *n, uint32_t result)
{
    store(&words(n)->ack_result, result);
    store(&words(n)->ack, n->seen);
    noxs_os_notify(n->evtchn);
}

int noxs_metadata(struct noxs *n, uint32_t offset, void *to, uint32_t length)
{
    int error;

    if (offset >= n->header.metadata_length)
        return 0;
    if (length > n->header.metadata_length - offset)
        length = n->header.metadata_length - offset;
    error = noxs_read(n, n->header.metadata_offset + offset, to, length);
    return error ? error : (int)length;
}

int noxs_metadata_check(struct noxs *n)
{
    /* Half a byte at a time: the table is small and 64 KiB take well under a millisecond. */
    uint32_t table[16], crc = ~0u, offset = 0;
    uint8_t part[256];
    int length;

    for (uint32_t i = 0; i < 16; i++) {
        table[i] = i;
        for (int bit = 0; bit < 4; bit++)
            table[i] = table[i] >> 1 ^ (table[i] & 1 ? 0xedb88320u : 0);
    }
    while ((length = noxs_metadata(n, offset, part, sizeof(part))) > 0) {
        for (int i = 0; i < length; i++) {
            crc = crc >> 4 ^ table[(crc ^ part[i]) & 15];
            crc = crc >> 4 ^ table[(crc ^ part[i] >> 4) & 15];
        }
        offset += (uint32_t)length;
    }
    return length < 0 ? length : ~crc == n->header.metadata_crc ? 0 : NOXS_EBAD;
}

static int find_device(struct noxs *n, uint16_t type, uint32_t index, void *slot)
{
    for (uint32_t i = 0; i < n->header.device_count; i++) {
        struct noxs_device *device = slot;
        int error = noxs_read(n, n->header.devices_offset + i * n->header.slot_size, slot,
                              NOXS_SLOT_SIZE);

        if (error)
            return error;
        if (device->type == type && index-- == 0)
            return device->queues && device->queues <= NOXS_MAX_QUEUES ? 0 : NOXS_EBAD;
    }
    return NOXS_ENOENT;
}

int noxs_vif(struct noxs *n, uint32_t index, struct noxs_vif *vif)
{
    return find_device(n, NOXS_VIF, index, vif);
}

int noxs_vbd(struct noxs *n, uint32_t index, struct noxs_vbd *vbd)
{
    return find_device(n, NOXS_VBD, index, vbd);
}

int noxs_vif_queue(struct noxs *n, const struct noxs_vif *vif, uint32_t queue,
                   struct noxs_vif_queue *out)
{
    if (queue >= vif->dev.queues)
        return NOXS_ENOENT;
    if (queue)
        return noxs_read(n, vif->dev.more_queues + (queue - 1) * NOXS_QUEUE_SIZE, out,
                         sizeof(*out));
    *out = vif->queue;
    return 0;
}

int noxs_reserved(struct noxs *n, uint32_t pfn)
{
    const volatile uint8_t *at = n->area[0] + NOXS_EXTENTS_OFFSET;

    for (uint32_t i = 0; i < n->header.extent_count; i++, at += sizeof(struct noxs_extent))
        if (pfn - load(at) < load(at + 4))
            return 1;
    at = n->area[0] + NOXS_MORE_PAGES_OFFSET;
    for (uint32_t i = 1; i < n->header.pages; i++, at += 4)
        if (pfn == load(at))
            return 1;
    return 0;
}

/* ---- Grants ---------------------------------------------------------------------- */

#define GRANT_PERMIT   1u
#define GRANT_READONLY 4u
#define GRANT_READING  8u
#define GRANT_WRITING  16u

static int grants_open(struct noxs *n)
{
    if (n->grants)
        return 0;
    n->grants = noxs_os_grants(&n->grant_count);
    if (!n->grants)
        return NOXS_ENOMEM;
    n->grant_next = n->header.first_free_gref;
    return 0;
}

int64_t noxs_grant(struct noxs *n, uint16_t domid, const void *page, int readonly)
{
    struct noxs_grant *entry;
    uint32_t reference;

    if (grants_open(n))
        return NOXS_ENOMEM;
    /* A free entry's frame field holds the next free reference. 0 is never ours. */
    if (n->grant_free) {
        reference = n->grant_free;
        n->grant_free = n->grants[reference].frame;
    } else if (n->grant_next < n->grant_count) {
        reference = n->grant_next++;
    } else {
        return NOXS_ENOMEM;
    }
    entry = &n->grants[reference];
    entry->frame = noxs_os_frame(page);
    entry->domid = domid;
    __atomic_store_n(&entry->flags, (uint16_t)(GRANT_PERMIT | (readonly ? GRANT_READONLY : 0)),
                     __ATOMIC_RELEASE);
    return reference;
}

int noxs_ungrant(struct noxs *n, uint32_t reference)
{
    struct noxs_grant *entry;
    uint16_t flags;

    if (!n->grants || reference < n->header.first_free_gref || reference >= n->grant_next)
        return NOXS_EBAD;
    entry = &n->grants[reference];
    flags = __atomic_load_n(&entry->flags, __ATOMIC_ACQUIRE);
    do {
        if (flags & (GRANT_READING | GRANT_WRITING))
            return NOXS_EBAD;
    } while (!__atomic_compare_exchange_n(&entry->flags, &flags, 0, 0, __ATOMIC_SEQ_CST,
                                          __ATOMIC_ACQUIRE));
    entry->frame = n->grant_free;
    n->grant_free = reference;
    return 0;
}

/* ---- Network rings (public/io/netif.h, public/io/ring.h) -------------------------- */

#define REQ_PROD  0
#define REQ_EVENT 4
#define RSP_PROD  8
#define RSP_EVENT 12
#define SLOTS     64

#define RING NOXS_NET_RING

struct tx_request {
    uint32_t gref;
    uint16_t offset, flags, id, size;
};

struct rx_request {
    uint16_t id, pad;
    uint32_t gref;
};

struct rx_response {
    uint16_t id, offset, flags;
    int16_t status;
};

#define TX_BLANK  1u
#define TX_VALID  2u
#define RX_VALID  1u
#define RX_BLANK  2u
#define RX_MORE   4u
#define RX_EXTRA  8u
#define EXTRA_MORE 1u

#define NO_BUFFER 0xffffu

static volatile void *tx_slot(struct noxs_net *net, uint32_t index)
{
    return net->tx + SLOTS + (index % RING) * sizeof(struct tx_request);
}

static volatile void *rx_slot(struct noxs_net *net, uint32_t index)
{
    return net->rx + SLOTS + (index % RING) * sizeof(struct rx_request);
}

/* Publish requests; does the backend want to hear of them? (RING_PUSH_REQUESTS_AND_CHECK_NOTIFY) */
static int push(volatile uint8_t *ring, uint32_t old, uint32_t prod)
{
    store(ring + REQ_PROD, prod);
    full_barrier();
    return prod - load(ring + REQ_EVENT) < prod - old;
}

static void post(struct noxs_net *net, uint16_t buffer)
{
    volatile struct rx_request *request = rx_slot(net, net->rx_prod);

    request->id = buffer;
    request->pad = 0;
    request->gref = net->rx_gref[buffer];
    net->rx_slot[net->rx_prod % RING] = buffer;
    net->rx_prod++;
}

static void repost(struct noxs_net *net, uint32_t from, uint32_t to)
{
    uint32_t old = net->rx_prod;

    for (; from != to; from++)
        post(net, net->rx_slot[from % RING]);
    if (push(net->rx, old, net->rx_prod))
        noxs_os_notify(net->queue.rx_evtchn);
}

int noxs_net_open(struct noxs_net *net, struct noxs *n, const struct noxs_vif *vif,
                  uint32_t queue, uint32_t rx_count, uint32_t tx_count)
{
    uint32_t posted;
    int error;

    memset(net, 0, sizeof(*net));
    net->noxs = n;
    net->vif = *vif;
    error = noxs_vif_queue(n, vif, queue, &net->queue);
    if (error)
        return error;
    posted = net->queue.posted_count;
    if (rx_count < posted)
        rx_count = posted;
    if (rx_count < 2 || rx_count > RING || tx_count < 2 || tx_count > RING)
        return NOXS_EBAD;
    net->tx = noxs_os_map(net->queue.tx_pfn);
    net->rx = noxs_os_map(net->queue.rx_pfn);
    if (!net->tx || !net->rx)
        return NOXS_ENOMEM;
    for (uint32_t i = 0; i < posted; i++) {
        net->rx_page[i] = noxs_os_map(net->queue.posted_pfn + i);
        if (!net->rx_page[i])
            return NOXS_ENOMEM;
        net->rx_gref[i] = net->queue.posted_gref + i;
        net->rx_slot[i] = (uint16_t)i;
    }
    net->rx_count = net->rx_prod = posted;
    /* As many more buffers as there is memory for; two of each are the least that works. */
    for (; net->rx_count < rx_count; net->rx_count++) {
        void *page = noxs_os_page();
        int64_t gref = page ? noxs_grant(n, vif->dev.backend, page, 0) : NOXS_ENOMEM;

        if (gref < 0)
            break;
        net->rx_page[net->rx_count] = page;
        net->rx_gref[net->rx_count] = (uint32_t)gref;
        post(net, (uint16_t)net->rx_count);
    }
    for (; net->tx_count < tx_count; net->tx_count++) {
        void *page = noxs_os_page();
        int64_t gref = page ? noxs_grant(n, vif->dev.backend, page, 1) : NOXS_ENOMEM;

        if (gref < 0)
            break;
        net->tx_page[net->tx_count] = page;
        net->tx_gref[net->tx_count] = (uint32_t)gref;
        net->tx_free[net->tx_free_count++] = (uint16_t)net->tx_count;
    }
    if (net->rx_count < 2 || net->tx_count < 2)
        return NOXS_ENOMEM;
    /* The backend may have stalled for want of buffers before its event index was set. */
    push(net->rx, posted, net->rx_prod);
    noxs_os_notify(net->queue.rx_evtchn);
    return 0;
}

/*
 * One packet: a response, its extra infos, then the responses with its further data. All of
 * it is there or none: netback publishes whole packets. Buffers go by ring slot, not by id,
 * since an extra info overwrites the response whose id it would be.
 */
static uint32_t take(struct noxs_net *net, uint32_t prod, uint8_t *to, uint32_t size,
                     uint32_t *flags)
{
    uint32_t cons = net->rx_cons, length = 0;
    int bad = 0, extra = 0, more;

    *flags = 0;
    do {
        const volatile struct rx_response *shared = rx_slot(net, cons);
        struct rx_response response = {
            .offset = shared->offset, .flags = shared->flags, .status = shared->status};
        uint32_t part = response.status < 0 ? 0 : (uint32_t)response.status;
        uint16_t buffer = net->rx_slot[cons % RING];

        more = response.flags & RX_MORE;
        if (cons == net->rx_cons) {
            extra = response.flags & RX_EXTRA;
            *flags = (response.flags & RX_BLANK ? NOXS_NET_BLANK : 0) |
                     (response.flags & RX_VALID ? NOXS_NET_VALID : 0);
        }
        cons++;
        if (response.status < 0 || response.offset + part > PAGE || length + part > size)
            bad = 1;
        else if (!bad)
            memcpy(to + length, net->rx_page[buffer] + response.offset, part);
        length += part;
        while (extra && cons != prod) {
            extra = ((const volatile uint8_t *)rx_slot(net, cons))[1] & EXTRA_MORE;
            cons++;
        }
    } while (more && cons != prod);
    net->rx_cons = cons;
    if (bad || more || !length) {
        net->rx_dropped++;
        return 0;
    }
    net->rx_frames++;
    return length;
}

uint32_t noxs_net_receive(struct noxs_net *net, void *to, uint32_t size, uint32_t *flags)
{
    for (;;) {
        uint32_t prod = load(net->rx + RSP_PROD), first = net->rx_cons, length;

        if (prod == first) {
            store(net->rx + RSP_EVENT, first + 1);
            full_barrier();
            if (load(net->rx + RSP_PROD) == first)
                return 0;
            continue;
        }
        if (prod - first > net->rx_prod - first) {
            /* More answers than questions: nothing in this ring can be believed. */
            net->rx_dropped++;
            return 0;
        }
        length = take(net, prod, to, size, flags);
        repost(net, first, net->rx_cons);
        if (length)
            return length;
    }
}

static void reap(struct noxs_net *net)
{
    uint32_t prod = load(net->tx + RSP_PROD);

    if (prod - net->tx_cons > net->tx_prod - net->tx_cons)
        return;
    for (; net->tx_cons != prod; net->tx_cons++) {
        const volatile uint16_t *response = tx_slot(net, net->tx_cons);
        uint16_t id = response[0];
        int16_t status = (int16_t)response[1];

        if (status < 0)
            net->tx_errors++;
        if (id >= net->tx_count || !net->tx_busy[id])
            continue;
        net->tx_busy[id] = 0;
        net->tx_free[net->tx_free_count++] = id;
    }
}

void *noxs_net_frame(struct noxs_net *net)
{
    /* Only then: what reap() adds goes on top, where the page that was got last must stay. */
    if (!net->tx_free_count)
        reap(net);
    if (!net->tx_free_count) {
        store(net->tx + RSP_EVENT, net->tx_cons + 1);
        full_barrier();
        reap(net);
    }
    return net->tx_free_count ? net->tx_page[net->tx_free[net->tx_free_count - 1]] : NULL;
}

void noxs_net_send(struct noxs_net *net, uint32_t length, uint32_t flags)
{
    volatile struct tx_request *request = tx_slot(net, net->tx_prod);
    uint16_t id;

    if (!net->tx_free_count || !length || length > PAGE)
        return;
    id = net->tx_free[--net->tx_free_count];
    net->tx_busy[id] = 1;
    request->gref = net->tx_gref[id];
    request->offset = 0;
    request->flags = flags & NOXS_NET_BLANK ? TX_BLANK | TX_VALID : 0;
    request->id = id;
    request->size = (uint16_t)length;
    net->tx_prod++;
    net->tx_frames++;
    if (push(net->tx, net->tx_prod - 1, net->tx_prod))
        noxs_os_notify(net->queue.tx_evtchn);
}

/* ---- Block ring (public/io/blkif.h, in the x86-64 layout) -------------------------- */

struct blk_segment {
    uint32_t gref;
    uint8_t first, last; /* sectors in the page, both used */
    uint16_t pad;
};

struct blk_request {
    uint8_t operation, segments;
    uint16_t handle;
    uint32_t pad;
    uint64_t id, sector;
    struct blk_segment segment[11];
};

struct blk_response {
    uint64_t id;
    uint8_t operation, pad;
    int16_t status;
};

_Static_assert(sizeof(struct blk_request) == 112, "block request");

static volatile void *blk_slot(struct noxs_disk *disk, uint32_t index)
{
    return disk->ring + SLOTS + (index % NOXS_DISK_RING) * sizeof(struct blk_request);
}

int noxs_disk_open(struct noxs_disk *disk, struct noxs *n, const struct noxs_vbd *vbd)
{
    memset(disk, 0, sizeof(*disk));
    disk->noxs = n;
    disk->vbd = *vbd;
    if (vbd->queue.ring_order)
        return NOXS_EBAD;
    disk->ring = noxs_os_map(vbd->queue.ring_pfn[0]);
    return disk->ring ? 0 : NOXS_ENOMEM;
}

int noxs_disk_start(struct noxs_disk *disk, uint32_t operation, uint64_t sector, uint32_t count,
                    void *page)
{
    volatile struct blk_request *request = blk_slot(disk, disk->prod);
    int flush = operation == NOXS_DISK_FLUSH;
    uint32_t id = 0;
    int64_t gref = 0;

    if (!flush && (!count || count > PAGE / NOXS_SECTOR))
        return NOXS_EBAD;
    while (id < NOXS_DISK_RING && disk->busy >> id & 1)
        id++;
    if (id == NOXS_DISK_RING || disk->prod - disk->cons >= NOXS_DISK_RING)
        return NOXS_ENOENT;
    if (!flush)
        gref = noxs_grant(disk->noxs, disk->vbd.dev.backend, page, operation == NOXS_DISK_WRITE);
    if (gref < 0)
        return NOXS_ENOMEM;
    request->operation = (uint8_t)operation;
    request->segments = !flush;
    request->handle = (uint16_t)disk->vbd.dev.handle;
    request->id = id;
    request->sector = sector;
    request->segment[0].gref = (uint32_t)gref;
    request->segment[0].first = 0;
    request->segment[0].last = (uint8_t)(flush ? 0 : count - 1);
    disk->gref[id] = (uint32_t)gref;
    disk->busy |= 1u << id;
    disk->prod++;
    disk->requests++;
    if (push(disk->ring, disk->prod - 1, disk->prod))
        noxs_os_notify(disk->vbd.queue.evtchn);
    return (int)id;
}

int noxs_disk_done(struct noxs_disk *disk, int *status)
{
    const volatile struct blk_response *response;
    uint32_t prod = load(disk->ring + RSP_PROD);
    uint64_t id;

    if (prod == disk->cons) {
        store(disk->ring + RSP_EVENT, disk->cons + 1);
        full_barrier();
        prod = load(disk->ring + RSP_PROD);
        if (prod == disk->cons)
            return NOXS_ENOENT;
    }
    if (prod - disk->cons > disk->prod - disk->cons)
        return NOXS_EBAD; /* more answers than questions */
    response = blk_slot(disk, disk->cons);
    id = response->id;
    *status = response->status;
    disk->cons++;
    if (id >= NOXS_DISK_RING || !(disk->busy >> id & 1))
        return NOXS_EBAD;
    if (disk->gref[id] && noxs_ungrant(disk->noxs, disk->gref[id]))
        return NOXS_EBAD; /* it says that it is done and keeps the page */
    disk->busy &= ~(1u << id);
    if (*status)
        disk->errors++;
    return (int)id;
}
