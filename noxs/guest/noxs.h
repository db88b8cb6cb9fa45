/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * noxs: the device page, for unikernels.
 *
 * The first half is the ABI, version 1; docs/noxs-abi.md is its contract. The second half
 * declares noxs.c, one file that any unikernel may drop in: it reads the page, answers the
 * toolstack, hands out the metadata and drives vifs and vbds. noxs.c needs the five noxs_os_*
 * functions below, and memcpy() and memset() as every freestanding program does.
 *
 * No other header is needed: <stdint.h> and <stddef.h> are the compiler's own.
 */
#ifndef NOXS_H
#define NOXS_H

#include <stddef.h>
#include <stdint.h>

/* ---- ABI ------------------------------------------------------------------------- */

#define NOXS_MAGIC        0x53584f4eu /* "NOXS" */
#define NOXS_ABI_MAJOR    1
#define NOXS_ABI_MINOR    0
#define NOXS_ABI_VERSION  ((NOXS_ABI_MAJOR << 16) | NOXS_ABI_MINOR)

#define NOXS_NOTE_OWNER   "noxs"
#define NOXS_NOTE_TYPE    1

#define NOXS_PAGE_SIZE    4096
#define NOXS_MAX_PAGES    64
#define NOXS_MAX_DEVICES  128
#define NOXS_MAX_QUEUES   64
#define NOXS_MAX_METADATA 65536
#define NOXS_MAX_NAME     127
#define NOXS_MAX_MESSAGE  128
#define NOXS_MAX_EXTENTS  16
#define NOXS_MAX_POSTED   256

#define NOXS_REQUEST_OFFSET    0x100
#define NOXS_GUEST_OFFSET      0x140
#define NOXS_MORE_PAGES_OFFSET 0x200
#define NOXS_EXTENTS_OFFSET    0x300
#define NOXS_SLOTS_OFFSET      0x400
#define NOXS_SLOT_SIZE         128
#define NOXS_QUEUE_SIZE        48

/* Device types; a guest skips those that it does not know. */
#define NOXS_EMPTY 0
#define NOXS_VIF   1
#define NOXS_VBD   2

/* Request codes. */
#define NOXS_REQUEST_NONE     0
#define NOXS_REQUEST_POWEROFF 1
#define NOXS_REQUEST_REBOOT   2
#define NOXS_REQUEST_SUSPEND  3
#define NOXS_REQUEST_RESUME   4
#define NOXS_REQUEST_SYSRQ    5 /* argument: the key, ASCII */
#define NOXS_REQUEST_REREAD   6 /* the page has changed */

#define NOXS_ACK_OK          0
#define NOXS_ACK_UNSUPPORTED 1
#define NOXS_ACK_REFUSED     2

/* The guest's state word. */
#define NOXS_STATE_BOOTING   0
#define NOXS_STATE_READY     1
#define NOXS_STATE_POWEROFF  2
#define NOXS_STATE_REBOOT    3
#define NOXS_STATE_SUSPENDED 4
#define NOXS_STATE_FAILED    5

/* vif: what the backend was told that it may send, ... */
#define NOXS_VIF_RX_SG             (1u << 0)
#define NOXS_VIF_RX_GSO_TCPV4      (1u << 1)
#define NOXS_VIF_RX_GSO_TCPV6      (1u << 2)
#define NOXS_VIF_RX_CSUM_BLANK     (1u << 3)
#define NOXS_VIF_RX_CSUM_BLANK_V6  (1u << 4)
#define NOXS_VIF_RX_NOTIFY         (1u << 5)
/* ... what the guest may send, ... */
#define NOXS_VIF_TX_SG             (1u << 8)
#define NOXS_VIF_TX_GSO_TCPV4      (1u << 9)
#define NOXS_VIF_TX_GSO_TCPV6      (1u << 10)
#define NOXS_VIF_TX_CSUM_BLANK     (1u << 11)
#define NOXS_VIF_TX_CSUM_BLANK_V6  (1u << 12)
/* ... and how the two are connected. */
#define NOXS_VIF_SPLIT_EVTCHN      (1u << 16)
#define NOXS_VIF_CTRL_RING         (1u << 17)
#define NOXS_VIF_MULTICAST_CONTROL (1u << 18)

/* vbd: after the backend's feature-* keys in public/io/blkif.h. */
#define NOXS_VBD_FLUSH          (1u << 0)
#define NOXS_VBD_BARRIER        (1u << 1)
#define NOXS_VBD_DISCARD        (1u << 2)
#define NOXS_VBD_DISCARD_SECURE (1u << 3)
#define NOXS_VBD_PERSISTENT     (1u << 4)
#define NOXS_VBD_INDIRECT       (1u << 5)

/* The page starts with this; the toolstack writes it. */
struct noxs_header {
    uint32_t magic;
    uint16_t abi_major;
    uint16_t abi_minor;
    uint32_t generation;      /* odd while the toolstack changes the page */
    uint16_t pages;           /* of the whole area, this one included */
    uint16_t header_size;     /* where the request words start: 0x100 */
    uint32_t devices_offset;
    uint16_t device_count;
    uint16_t slot_size;
    uint32_t metadata_offset;
    uint32_t metadata_length;
    uint32_t metadata_crc;    /* CRC-32 as in IEEE 802.3 */
    uint32_t first_free_gref; /* smaller references are the toolstack's */
    uint16_t domid;
    uint16_t extent_count;
    uint32_t flags;           /* 0 */
    uint8_t  uuid[16];
    uint8_t  reserved[64];
    char     name[128];       /* UTF-8, ends with NUL */
};

/* At 0x100, a cache line of its own; the toolstack writes it. */
struct noxs_request {
    uint32_t seq;             /* written last; 0: nothing asked yet */
    uint32_t code;
    uint32_t argument;
    uint8_t  reserved[52];
};

/* At 0x140, three cache lines of their own; the guest writes them. */
struct noxs_guest {
    uint32_t ack;             /* seq of the last request taken; written last */
    uint32_t ack_result;
    uint32_t state;
    int32_t  exit_code;
    uint32_t accepts;         /* bit n: request code n is obeyed */
    uint32_t message_length;
    uint32_t abi;             /* NOXS_ABI_VERSION that the guest was built for */
    uint8_t  reserved[36];
    char     message[NOXS_MAX_MESSAGE];
};

/* At 0x300: pages that belong to the toolstack. */
struct noxs_extent {
    uint32_t pfn;
    uint32_t count;
};

/* How each device slot starts. */
struct noxs_device {
    uint16_t type;
    uint16_t flags;           /* 0 */
    uint32_t handle;
    uint16_t backend;         /* domain id */
    uint16_t queues;
    uint32_t features;
    uint32_t more_queues;     /* area offset of queue 1..; 0 with one queue */
};

struct noxs_vif_queue {
    uint32_t tx_pfn;
    uint32_t tx_gref;
    uint32_t rx_pfn;
    uint32_t rx_gref;
    uint32_t tx_evtchn;       /* equal to rx_evtchn: one channel for both */
    uint32_t rx_evtchn;
    uint32_t posted_pfn;      /* receive requests already in the ring: number k has */
    uint32_t posted_gref;     /* id k, page posted_pfn + k, reference posted_gref + k */
    uint32_t posted_count;
    uint8_t  reserved[12];
};

struct noxs_vif {
    struct noxs_device dev;   /* handle: 0.. as in vifDOMID.HANDLE */
    uint16_t mtu;
    uint8_t  mac[6];
    uint8_t  ipv4[4];         /* zero: none */
    uint8_t  ipv4_gateway[4];
    uint8_t  ipv4_prefix;
    uint8_t  ipv6_prefix;
    uint8_t  reserved0[2];
    uint8_t  ipv6[16];
    uint8_t  ipv6_gateway[16];
    struct noxs_vif_queue queue;
    uint8_t  reserved[8];
};

struct noxs_vbd_queue {
    uint32_t ring_order;      /* 0..2 */
    uint32_t evtchn;
    uint32_t ring_pfn[4];
    uint32_t ring_gref[4];
    uint8_t  reserved[8];
};

struct noxs_vbd {
    struct noxs_device dev;   /* handle: the device number of public/io/blkif.h */
    uint32_t sector_size;
    uint64_t sectors;
    uint32_t info;            /* VDISK_* */
    uint32_t physical_sector_size;
    uint32_t max_segments;    /* of an indirect request; 0: none */
    uint32_t discard_granularity;
    uint32_t discard_alignment;
    uint8_t  reserved0[20];
    struct noxs_vbd_queue queue;
    uint8_t  reserved[8];
};

#if defined(__STDC_VERSION__) && __STDC_VERSION__ >= 201112L
_Static_assert(sizeof(struct noxs_header) == NOXS_REQUEST_OFFSET, "header");
_Static_assert(sizeof(struct noxs_request) == 64, "request");
_Static_assert(sizeof(struct noxs_guest) == 192, "guest words");
_Static_assert(sizeof(struct noxs_vif) == NOXS_SLOT_SIZE, "vif slot");
_Static_assert(sizeof(struct noxs_vbd) == NOXS_SLOT_SIZE, "vbd slot");
_Static_assert(sizeof(struct noxs_vif_queue) == NOXS_QUEUE_SIZE, "vif queue");
_Static_assert(sizeof(struct noxs_vbd_queue) == NOXS_QUEUE_SIZE, "vbd queue");
#endif

/*
 * The note by which the toolstack knows a noxs guest. Once, at file scope, in any C file;
 * the linker script keeps .note sections in a PT_NOTE segment.
 */
#define NOXS_ELF_NOTE()                                                                  \
    __asm__(".pushsection .note.noxs, \"a\", @note\n"                                    \
            "    .balign 4\n"                                                            \
            "    .long 5, 4, 1\n"                                                        \
            "    .asciz \"noxs\"\n"                                                      \
            "    .balign 4\n"                                                            \
            "    .long 0x00010000\n"                                                     \
            ".popsection\n")

/* ---- What the unikernel provides ------------------------------------------------- */

/* Map a page of the guest's own memory read-write; it stays mapped. NULL: impossible. */
void *noxs_os_map(uint32_t pfn);
/* A fresh zeroed page of the guest's own, page-aligned and never returned; NULL: none left. */
void *noxs_os_page(void);
/* What a grant entry says of this page: its machine frame (PV) or guest frame (PVH). */
uint32_t noxs_os_frame(const void *page);
/* The grant table, version 1, mapped, and how many entries it has. */
struct noxs_grant *noxs_os_grants(uint32_t *entries);
/* EVTCHNOP_send. */
void noxs_os_notify(uint32_t evtchn);

/* A version 1 grant entry (public/grant_table.h). */
struct noxs_grant {
    uint16_t flags;
    uint16_t domid;
    uint32_t frame;
};

/* ---- The page -------------------------------------------------------------------- */

/* Errors: functions return 0 or a count on success, one of these on failure. */
#define NOXS_ENOPAGE (-1) /* no magic: this guest was booted with a store */
#define NOXS_EABI    (-2) /* an ABI that this library does not speak */
#define NOXS_EBAD    (-3) /* the page contradicts itself */
#define NOXS_ENOENT  (-4) /* no such device, or no such metadata */
#define NOXS_ENOMEM  (-5) /* out of pages, grant references or mappings */

struct noxs {
    volatile uint8_t *area[NOXS_MAX_PAGES]; /* page 0 at once, others when touched */
    uint32_t area_pfn[NOXS_MAX_PAGES];
    struct noxs_header header;              /* a consistent copy */
    uint32_t evtchn;
    uint32_t seen;                          /* sequence number of the request being served */
    struct noxs_grant *grants;
    uint32_t grant_count, grant_next, grant_free;
};

/*
 * Take the page and the event channel that the boot protocol gave in the place of the
 * store's (PV: start_info.store_mfn, store_evtchn; PVH: HVM_PARAM_STORE_PFN,
 * HVM_PARAM_STORE_EVTCHN). NOXS_ENOPAGE: there is a XenStore ring at that place.
 */
int noxs_open(struct noxs *n, void *page, uint32_t evtchn);
/* Read the header again, after a request NOXS_REQUEST_REREAD. */
int noxs_reread(struct noxs *n);
/* Copy from the area, over page boundaries, consistently. */
int noxs_read(struct noxs *n, uint32_t offset, void *to, uint32_t length);

/* Tell the toolstack. noxs_state() rings the event channel: say the rest before it. */
void noxs_message(struct noxs *n, const char *text, size_t length);
void noxs_exit_code(struct noxs *n, int32_t code);
void noxs_state(struct noxs *n, uint32_t state);
/* Declare which requests are obeyed: a mask of 1 << NOXS_REQUEST_*. */
void noxs_accepts(struct noxs *n, uint32_t mask);
/* The request that waits, or NOXS_REQUEST_NONE. Each one must be acknowledged, which rings. */
uint32_t noxs_request(struct noxs *n, uint32_t *argument);
void noxs_acknowledge(struct noxs *n, uint32_t result);

/* Copy metadata; returns the bytes copied, 0 at the end. */
int noxs_metadata(struct noxs *n, uint32_t offset, void *to, uint32_t length);
/* 0 when the metadata's checksum is right, NOXS_EBAD when not. */
int noxs_metadata_check(struct noxs *n);

/* The index-th device of a type, counted without the others. NOXS_ENOENT: there are fewer. */
int noxs_vif(struct noxs *n, uint32_t index, struct noxs_vif *vif);
int noxs_vbd(struct noxs *n, uint32_t index, struct noxs_vbd *vbd);
/* Queue 0.. of a vif. */
int noxs_vif_queue(struct noxs *n, const struct noxs_vif *vif, uint32_t queue,
                   struct noxs_vif_queue *out);
/* Does this page belong to the toolstack? */
int noxs_reserved(struct noxs *n, uint32_t pfn);

/* Let a domain use a page; returns the reference, or NOXS_ENOMEM. */
int64_t noxs_grant(struct noxs *n, uint16_t domid, const void *page, int readonly);
/* Take it back. NOXS_EBAD: the other domain still has it mapped. */
int noxs_ungrant(struct noxs *n, uint32_t reference);

/* ---- A network interface --------------------------------------------------------- */

#define NOXS_NET_RING 256

/* Flags of a received frame, and of one to send. */
#define NOXS_NET_BLANK 1u /* TCP or UDP checksum not filled in, only the pseudo header's */
#define NOXS_NET_VALID 2u /* received: the checksum is known to be right */

struct noxs_net {
    struct noxs *noxs;
    struct noxs_vif vif;
    struct noxs_vif_queue queue;
    volatile uint8_t *tx, *rx; /* the shared rings */
    uint32_t tx_prod, tx_cons, rx_prod, rx_cons;
    uint32_t rx_count, tx_count;
    uint16_t rx_slot[NOXS_NET_RING]; /* ring slot -> buffer */
    uint16_t tx_free[NOXS_NET_RING];
    uint32_t tx_free_count;
    uint8_t  tx_busy[NOXS_NET_RING];
    uint8_t *rx_page[NOXS_NET_RING];
    uint32_t rx_gref[NOXS_NET_RING];
    uint8_t *tx_page[NOXS_NET_RING];
    uint32_t tx_gref[NOXS_NET_RING];
    uint64_t rx_frames, tx_frames, rx_dropped, tx_errors;
};

/*
 * Start queue 0.. of a vif with up to rx_count receive and tx_count send buffers of a page
 * each (2 to 256). Buffers that the toolstack posted count as receive buffers. What arrived
 * before is there to be received.
 */
int noxs_net_open(struct noxs_net *net, struct noxs *n, const struct noxs_vif *vif,
                  uint32_t queue, uint32_t rx_count, uint32_t tx_count);
/*
 * Copy the next frame into a buffer; its length, or 0 when there is none. Frames longer than
 * the buffer, and such as the backend failed to deliver, are counted and dropped. A call
 * that returned 0 has asked for an event at the next frame: wait on queue.rx_evtchn.
 */
uint32_t noxs_net_receive(struct noxs_net *net, void *to, uint32_t size, uint32_t *flags);
/*
 * A page to put a frame into, the same one until noxs_net_send() has sent it; NULL while all
 * are under way (an event on queue.tx_evtchn then says when to try again).
 */
void *noxs_net_frame(struct noxs_net *net);
void noxs_net_send(struct noxs_net *net, uint32_t length, uint32_t flags);

/* ---- A disk ---------------------------------------------------------------------- */

#define NOXS_DISK_RING 32  /* requests in a ring of one page */
#define NOXS_SECTOR    512 /* the unit of sector numbers, whatever sector_size is */

/* Operations of public/io/blkif.h. */
#define NOXS_DISK_READ  0u
#define NOXS_DISK_WRITE 1u
#define NOXS_DISK_FLUSH 3u

struct noxs_disk {
    struct noxs *noxs;
    struct noxs_vbd vbd;
    volatile uint8_t *ring;
    uint32_t prod, cons;
    uint32_t busy;                 /* bit n: request n is under way */
    uint32_t gref[NOXS_DISK_RING]; /* 0: a request without data */
    uint64_t requests, errors;
};

/* Start queue 0 of a vbd, which has a ring of one page. */
int noxs_disk_open(struct noxs_disk *disk, struct noxs *n, const struct noxs_vbd *vbd);
/*
 * Start a request: count sectors (1 to 8) from a sector number on, between the disk and the
 * start of a page, which stays untouched until the request is done; or a flush, which has
 * neither. Returns its number, NOXS_ENOENT while all are under way, NOXS_ENOMEM without a
 * grant reference, NOXS_EBAD for what cannot be asked. An event on vbd.queue.evtchn follows.
 */
int noxs_disk_start(struct noxs_disk *disk, uint32_t operation, uint64_t sector, uint32_t count,
                    void *page);
/*
 * The number of a request that is done, with *status 0, or negative where the backend failed
 * or refused it. NOXS_ENOENT: none; then an event has been asked for. NOXS_EBAD: the ring is
 * not to be believed.
 */
int noxs_disk_done(struct noxs_disk *disk, int *status);

#endif
