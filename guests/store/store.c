/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * A stock guest, without a noxs note: where others have their device page it has a XenStore, and
 * tries it. Words on its command line, obeyed in this order:
 *
 *   ask=N       read its own name N times, one after the other, and say how long that took
 *   lie         tell the back end of its first vif what is not so, in every way that it knows,
 *               and say what came of each; see lies[]
 *   theirs=PATH what it says its back end is, while it lies
 *   nonsense    leave indexes in the ring that cannot be
 *   flood       write and read for ever, as fast as it is answered, saying so every 512 times
 *
 * Then it sleeps with everything as it is.
 */
#include "../common/hypercall.h"
#include "../common/lib.h"
#include "../common/platform.h"

#include <xen/io/xs_wire.h>
#include <xen/grant_table.h>

#define PATH      256
#define PATIENCE  5000000000ul /* ns that a back end is given for a state */
#define GREF      64           /* the first that nothing uses */
#define NO_GREF   4000000000u
#define STORE_REF 1            /* GNTTAB_RESERVED_XENSTORE: the ring that we talk on */
#define STEP      512
#define DOM0      0

static struct xenstore_domain_interface *ring;
static char payload[XENSTORE_PAYLOAD_MAX];
static int heedless; /* replies are thrown away */

static void drop_replies(void)
{
    uint32_t prod = __atomic_load_n(&ring->rsp_prod, __ATOMIC_ACQUIRE);

    if (ring->rsp_cons == prod)
        return;
    __atomic_store_n(&ring->rsp_cons, prod, __ATOMIC_RELEASE);
    evtchn_notify(platform.store_evtchn);
}

static void rest(uint64_t ns)
{
    evtchn_wait(&platform.store_evtchn, 1, system_time() + ns);
    evtchn_take(platform.store_evtchn);
    if (heedless)
        drop_replies();
}

static void put(const void *from, size_t length)
{
    const char *bytes = from;
    uint32_t prod = ring->req_prod;

    for (size_t i = 0; i < length; i++) {
        while (prod - __atomic_load_n(&ring->req_cons, __ATOMIC_ACQUIRE) == XENSTORE_RING_SIZE) {
            evtchn_notify(platform.store_evtchn);
            rest(PATIENCE);
        }
        ring->req[MASK_XENSTORE_IDX(prod++)] = bytes[i];
        __atomic_store_n(&ring->req_prod, prod, __ATOMIC_RELEASE);
    }
}

static void get(void *to, size_t length)
{
    char *bytes = to;
    uint32_t cons = ring->rsp_cons;

    for (size_t i = 0; i < length; i++) {
        while (cons == __atomic_load_n(&ring->rsp_prod, __ATOMIC_ACQUIRE))
            rest(PATIENCE);
        bytes[i] = ring->rsp[MASK_XENSTORE_IDX(cons++)];
        __atomic_store_n(&ring->rsp_cons, cons, __ATOMIC_RELEASE);
    }
    evtchn_notify(platform.store_evtchn);
}

static void send(uint32_t type, const char *path, const char *value)
{
    struct xsd_sockmsg header = {.type = type, .len = (uint32_t)strlen(path) + 1};

    if (value)
        header.len += (uint32_t)strlen(value);
    put(&header, sizeof(header));
    put(path, strlen(path) + 1);
    if (value)
        put(value, strlen(value));
}

/* What comes for a request is in `payload`, ended with a NUL; returns whether it is no error. */
static int ask(uint32_t type, const char *path, const char *value)
{
    struct xsd_sockmsg header;

    send(type, path, value);
    evtchn_notify(platform.store_evtchn);
    get(&header, sizeof(header));
    if (header.len >= sizeof(payload))
        guest_exit(SHUTDOWN_BY_FAULT, 1, "the store's reply is too long");
    get(payload, header.len);
    payload[header.len] = '\0';
    return header.type == type;
}

static void ask_often(long count)
{
    uint64_t start = system_time(), longest = 0;

    for (long i = 0; i < count; i++) {
        uint64_t before = system_time(), taken;

        if (!ask(XS_READ, "name", NULL))
            print("store: its name cannot be read: %s\n", payload);
        taken = system_time() - before;
        if (taken > longest)
            longest = taken;
    }
    print("store: asked %ld times in %lu us, the longest %lu us\n", count,
          (system_time() - start) / 1000, longest / 1000);
}

static void flood(void)
{
    heedless = 1;
    for (unsigned long i = 1;; i++) {
        send(XS_WRITE, "data/flood", "a value that is somewhat longer than most");
        send(XS_READ, "data/flood", NULL);
        if (i % (STEP / 2) == 0)
            print("store: flooded with %lu\n", 2 * i);
    }
}

/* ---- Lies ------------------------------------------------------------------------ */

enum { UNUSED, STORE, READONLY, WILD };

/* A front end's nodes. A value that is NULL is a number: of the reference, of the channel. */
static const struct lie {
    const char *what;
    int tx, rx;
    const char *tx_text, *port_text;
} lies[] = {
    {"references of nothing", UNUSED, UNUSED, NULL, NULL},
    {"pages that are not to be written to", READONLY, READONLY, NULL, NULL},
    {"rings of noise", WILD, WILD, NULL, NULL},
    {"a channel that does not exist", WILD, WILD, NULL, "1000"},
    {"a path for a reference", WILD, WILD, "/local/domain/0", NULL},
    {"a negative channel", WILD, WILD, NULL, "-1"},
    {"its store's ring", STORE, STORE, NULL, NULL}, /* which may be its last: netback writes */
};

static uint8_t *noise[2];

static uint32_t reference(int kind, unsigned which)
{
    return kind == UNUSED     ? NO_GREF
           : kind == STORE    ? STORE_REF
           : kind == READONLY ? GREF + 2
                              : GREF + which;
}

static void tell(const char *key, const char *text, uint32_t number)
{
    char path[PATH], value[16];

    format(path, sizeof(path), "device/vif/0/%s", key);
    format(value, sizeof(value), "%u", number);
    if (!ask(XS_WRITE, path, text ? text : value))
        print("store: %s cannot be written: %s\n", key, payload);
}

/* Wait for the back end to be in one of the states, in order to see what it makes of us. */
static char state_of(const char *back, const char *states)
{
    uint64_t until = system_time() + PATIENCE;
    char path[PATH];

    format(path, sizeof(path), "%s/state", back);
    while (ask(XS_READ, path, NULL) && system_time() < until) {
        for (const char *s = states; *s; s++)
            if (*s == payload[0])
                return *s;
        rest(10000000);
    }
    return payload[0];
}

static void fill(uint64_t seed)
{
    for (unsigned page = 0; page < 2; page++)
        for (unsigned i = 0; i < NOXS_PAGE_SIZE; i++) {
            seed = seed * 6364136223846793005ul + 1442695040888963407ul;
            noise[page][i] = (uint8_t)(seed >> 56);
        }
}

static int share_noise(void)
{
    uint32_t entries = 0;
    struct noxs_grant *grants = platform.map_grants(&entries);

    for (unsigned i = 0; i < 2; i++)
        noise[i] = noxs_os_page();
    if (!grants || entries <= GREF + 2 || !noise[1])
        return 0;
    for (unsigned i = 0; i < 3; i++) {
        grants[GREF + i].domid = DOM0;
        grants[GREF + i].frame = platform.frame(noise[i % 2]);
        __atomic_store_n(&grants[GREF + i].flags,
                         i == 2 ? GTF_permit_access | GTF_readonly : GTF_permit_access,
                         __ATOMIC_RELEASE);
    }
    return 1;
}

static void lie(void)
{
    struct evtchn_alloc_unbound channel = {.dom = DOMID_SELF, .remote_dom = DOM0};
    char back[PATH], path[PATH], theirs[PATH];

    if (!ask(XS_READ, "device/vif/0/backend", NULL) || !share_noise() ||
        hypercall2(__HYPERVISOR_event_channel_op, EVTCHNOP_alloc_unbound, (uint64_t)&channel)) {
        print("store: there is nothing to lie with\n");
        return;
    }
    format(back, sizeof(back), "%s", payload);
    option_text("theirs", theirs, sizeof(theirs));
    for (unsigned i = 0; i < 2; i++) {
        format(path, sizeof(path), "%s/state", i ? theirs : back);
        print("store: %s back end's state is written: %s\n", i ? "their" : "my",
              ask(XS_WRITE, path, "6") ? "done" : payload);
    }
    tell("backend", theirs, 0);
    for (unsigned i = 0; i < sizeof(lies) / sizeof(lies[0]); i++) {
        const struct lie *it = &lies[i];

        print("store: lies about %s\n", it->what);
        state_of(back, "2");
        memset(noise[0], 0, NOXS_PAGE_SIZE); /* rings that netback takes, at first */
        memset(noise[1], 0, NOXS_PAGE_SIZE);
        tell("tx-ring-ref", it->tx_text, reference(it->tx, 0));
        tell("rx-ring-ref", NULL, reference(it->rx, 1));
        tell("event-channel", it->port_text, channel.port);
        tell("request-rx-copy", "1", 0);
        tell("state", "4", 0);
        print("store: its back end is in state %c\n", state_of(back, "456"));
        for (unsigned seed = 0; seed < 16; seed++) {
            fill(seed);
            evtchn_notify(channel.port);
        }
        tell("state", "5", 0);
        tell("state", "6", 0);
        state_of(back, "6");
        tell("state", "1", 0);
    }
}

void guest_main(void)
{
    ring = platform.store;
    if (!ring || !platform.store_evtchn || have_noxs)
        guest_exit(SHUTDOWN_BY_FAULT, 1, "there is no store");
    if (option("ask"))
        ask_often(option_number("ask", 1));
    if (option("lie"))
        lie();
    if (option("nonsense")) {
        ring->req_prod = ring->req_cons + 2 * XENSTORE_RING_SIZE;
        ring->rsp_cons = ring->rsp_prod - 3 * XENSTORE_RING_SIZE;
        evtchn_notify(platform.store_evtchn);
        print("store: its ring is nonsense\n");
    }
    if (option("flood"))
        flood();
    for (;;)
        evtchn_wait(NULL, 0, 0);
}
