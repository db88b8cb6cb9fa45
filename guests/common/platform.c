/* SPDX-License-Identifier: BSD-2-Clause */
#include "platform.h"

#include <xen/io/console.h>
#include <xen/sched.h>

#include "hypercall.h"
#include "lib.h"

struct platform platform;
struct noxs noxs;
int have_noxs;
int console_patient;
unsigned page_changes;

#define mb()  __asm__ volatile("mfence" : : : "memory")
#define wmb() __asm__ volatile("" : : : "memory")

void shutdown(unsigned reason)
{
    struct sched_shutdown how = {.reason = reason};

    for (;;)
        hypercall2(__HYPERVISOR_sched_op, SCHEDOP_shutdown, (uint64_t)&how);
}

/* ---- Event channels -------------------------------------------------------------- */

void evtchn_notify(uint32_t port)
{
    struct evtchn_send send = {.port = port};

    if (port)
        hypercall2(__HYPERVISOR_event_channel_op, EVTCHNOP_send, (uint64_t)&send);
}

int evtchn_take(uint32_t port)
{
    unsigned long bit = 1ul << (port % 64);
    unsigned long *word = &platform.shared->evtchn_pending[(port / 64) % 64];

    if (!port || !(__atomic_load_n(word, __ATOMIC_ACQUIRE) & bit))
        return 0;
    return (__atomic_fetch_and(word, ~bit, __ATOMIC_SEQ_CST) & bit) != 0;
}

void evtchn_wait(const uint32_t *ports, unsigned count, uint64_t until)
{
    struct sched_poll poll = {.nr_ports = count, .timeout = until};

    set_xen_guest_handle(poll.ports, (evtchn_port_t *)(uintptr_t)ports);
    if (hypercall2(__HYPERVISOR_sched_op, SCHEDOP_poll, (uint64_t)&poll)) {
        /* A port that does not exist: without events, look again in a while. */
        poll.nr_ports = 0;
        poll.timeout = system_time() + 10000000;
        hypercall2(__HYPERVISOR_sched_op, SCHEDOP_poll, (uint64_t)&poll);
    }
}

/* ---- Time ------------------------------------------------------------------------ */

static uint64_t tsc(void)
{
    uint32_t low, high;

    __asm__ volatile("lfence; rdtsc" : "=a"(low), "=d"(high) : : "memory");
    return (uint64_t)high << 32 | low;
}

uint64_t system_time(void)
{
    const volatile struct vcpu_time_info *time = &platform.shared->vcpu_info[0].time;
    uint64_t now;
    uint32_t version;

    do {
        uint64_t delta;
        int8_t shift;

        version = time->version;
        wmb();
        delta = tsc() - time->tsc_timestamp;
        shift = time->tsc_shift;
        delta = shift < 0 ? delta >> -shift : delta << shift;
        now = time->system_time +
              (uint64_t)(((unsigned __int128)delta * time->tsc_to_system_mul) >> 32);
        wmb();
    } while ((version & 1) || version != time->version);
    return now;
}

uint64_t wall_clock(void)
{
    const volatile struct shared_info *shared = platform.shared;
    uint64_t seconds, nanoseconds;
    uint32_t version;

    do {
        version = shared->wc_version;
        wmb();
        seconds = (uint64_t)shared->wc_sec_hi << 32 | shared->wc_sec;
        nanoseconds = shared->wc_nsec;
        wmb();
    } while ((version & 1) || version != shared->wc_version);
    return seconds + (nanoseconds + system_time()) / 1000000000;
}

/* ---- The console ----------------------------------------------------------------- */

/* Put what fits; returns how much that was. */
static size_t console_put(const char *text, size_t length)
{
    struct xencons_interface *ring = platform.console;
    uint32_t cons = __atomic_load_n(&ring->out_cons, __ATOMIC_ACQUIRE);
    uint32_t prod = ring->out_prod;
    size_t done = 0;

    mb();
    for (; done < length && prod - cons < sizeof(ring->out); done++)
        ring->out[MASK_XENCONS_IDX(prod++, ring->out)] = text[done];
    __atomic_store_n(&ring->out_prod, prod, __ATOMIC_RELEASE);
    return done;
}

void console_write(const char *text, size_t length)
{
    if (!platform.console)
        return;
    while (length) {
        size_t done = console_put(text, length);

        evtchn_notify(platform.console_evtchn);
        text += done;
        length -= done;
        if (!length)
            return;
        if (!console_patient)
            return;
        /* The reader says when there is room; a request must not wait for a reader. */
        evtchn_wait((uint32_t[]){platform.console_evtchn, platform.store_evtchn},
                    platform.store_evtchn ? 2 : 1, system_time() + 1000000000);
        evtchn_take(platform.console_evtchn);
        guest_control();
    }
}

size_t console_read(char *to, size_t size)
{
    struct xencons_interface *ring = platform.console;
    uint32_t prod, cons;
    size_t done = 0;

    if (!ring)
        return 0;
    prod = __atomic_load_n(&ring->in_prod, __ATOMIC_ACQUIRE);
    cons = ring->in_cons;
    for (; done < size && cons != prod; done++)
        to[done] = ring->in[MASK_XENCONS_IDX(cons++, ring->in)];
    if (done) {
        __atomic_store_n(&ring->in_cons, cons, __ATOMIC_RELEASE);
        evtchn_notify(platform.console_evtchn);
    }
    return done;
}

void print(const char *what, ...)
{
    char line[512], *at = line;
    va_list arguments;
    size_t length;

    va_start(arguments, what);
    length = vformat(line, sizeof(line), what, arguments);
    va_end(arguments);
    if (length > sizeof(line) - 1)
        length = sizeof(line) - 1;
    /* The other end is a raw terminal. */
    for (size_t i = 0; i < length; i++)
        if (line[i] == '\n') {
            console_write(at, (size_t)(&line[i] - at));
            console_write("\r\n", 2);
            at = &line[i] + 1;
        }
    if (at < line + length)
        console_write(at, (size_t)(line + length - at));
}

/* ---- The toolstack --------------------------------------------------------------- */

void guest_ready(void)
{
    if (have_noxs) {
        noxs_accepts(&noxs, 1u << NOXS_REQUEST_POWEROFF | 1u << NOXS_REQUEST_REBOOT |
                                1u << NOXS_REQUEST_SYSRQ | 1u << NOXS_REQUEST_REREAD);
        noxs_state(&noxs, NOXS_STATE_READY);
    } else {
        evtchn_notify(platform.store_evtchn);
    }
}

void guest_exit(unsigned reason, int code, const char *message)
{
    if (have_noxs) {
        noxs_message(&noxs, message, strlen(message));
        noxs_exit_code(&noxs, code);
        noxs_state(&noxs, reason == SHUTDOWN_poweroff ? NOXS_STATE_POWEROFF
                          : reason == SHUTDOWN_reboot ? NOXS_STATE_REBOOT
                                                      : NOXS_STATE_FAILED);
    }
    if (reason == SHUTDOWN_BY_FAULT)
        __asm__ volatile("movl $0, 8" : : : "memory"); /* page 0 is unmapped */
    shutdown(reason);
}

static void leave(unsigned reason)
{
    char message[NOXS_MAX_MESSAGE + 1];

    noxs_acknowledge(&noxs, NOXS_ACK_OK);
    if (!option_text("message", message, sizeof(message)))
        format(message, sizeof(message), "as asked");
    guest_exit(reason, (int)option_number("exit", 0), message);
}

void guest_control(void)
{
    uint32_t argument, code;

    evtchn_take(platform.store_evtchn);
    if (!have_noxs)
        return;
    code = noxs_request(&noxs, &argument);
    switch (code) {
    case NOXS_REQUEST_NONE:
        return;
    case NOXS_REQUEST_POWEROFF:
        if (option("refuse"))
            break;
        leave(SHUTDOWN_poweroff);
        return;
    case NOXS_REQUEST_REBOOT:
        if (option("refuse"))
            break;
        leave(SHUTDOWN_reboot);
        return;
    case NOXS_REQUEST_REREAD:
        if (noxs_reread(&noxs))
            break;
        page_changes++;
        noxs_acknowledge(&noxs, NOXS_ACK_OK);
        return;
    case NOXS_REQUEST_SYSRQ:
        noxs_acknowledge(&noxs, NOXS_ACK_OK);
        console_patient = 0;
        print("sysrq: %c\n", argument >= ' ' && argument < 127 ? (char)argument : '?');
        if (argument == 'c')
            guest_exit(SHUTDOWN_crash, 1, "sysrq c");
        return;
    default:
        noxs_acknowledge(&noxs, NOXS_ACK_UNSUPPORTED);
        return;
    }
    noxs_acknowledge(&noxs, NOXS_ACK_REFUSED);
}

/* ---- What noxs.c asks for -------------------------------------------------------- */

void *noxs_os_map(uint32_t pfn)
{
    return platform.map(pfn);
}

void *noxs_os_page(void)
{
    while (platform.heap < platform.heap_end) {
        uint32_t pfn = platform.heap++;

        if (!have_noxs || !noxs_reserved(&noxs, pfn)) {
            void *page = platform.map(pfn);

            if (page)
                return memset(page, 0, NOXS_PAGE_SIZE);
        }
    }
    return NULL;
}

uint32_t noxs_os_frame(const void *page)
{
    return platform.frame(page);
}

struct noxs_grant *noxs_os_grants(uint32_t *entries)
{
    return platform.map_grants(entries);
}

void noxs_os_notify(uint32_t evtchn)
{
    evtchn_notify(evtchn);
}

void platform_run(void)
{
    have_noxs = platform.store && platform.store_evtchn &&
                !noxs_open(&noxs, platform.store, platform.store_evtchn);
    guest_main();
    guest_exit(SHUTDOWN_poweroff, 0, "");
}
