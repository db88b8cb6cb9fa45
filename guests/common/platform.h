/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * The machine under a guest. platform.c is common; pv.c and pvh.c know what is particular to
 * their boot protocols. Every image starts as either.
 */
#ifndef PLATFORM_H
#define PLATFORM_H

#include <stddef.h>
#include <stdint.h>
#include <xen/xen.h>
#include <xen/event_channel.h>

#include "../../noxs/guest/noxs.h"

struct platform {
    const char *kind;    /* "PV" or "PVH" */
    char cmdline[1024];
    struct shared_info *shared;
    struct xencons_interface *console;
    uint32_t console_evtchn;
    void *store;         /* the page in the store's place, or NULL */
    uint32_t store_evtchn;
    uint32_t heap, heap_end; /* pfns that nothing uses yet and that are mapped */
    uint32_t pages;      /* memory of this guest */

    /* Filled in by the boot code. */
    void *(*map)(uint32_t pfn);
    uint32_t (*frame)(const void *page);
    void *(*map_grants)(uint32_t *entries); /* once */
    void (*mask_events)(void);              /* no upcall does harm, whatever shared_info says */
};

#define GRANT_FRAMES 4

extern struct platform platform;
/* noxs_open() succeeded: there is a device page. */
extern struct noxs noxs;
extern int have_noxs;

/* platform.c: what the boot code calls once `platform` is filled in. */
void platform_run(void) __attribute__((noreturn));

#define SHUTDOWN_BY_FAULT 100
void shutdown(unsigned reason) __attribute__((noreturn)); /* SHUTDOWN_* of public/sched.h */

/* Event channels, without upcalls: poll, and sleep in SCHEDOP_poll. */
void evtchn_notify(uint32_t port);
/* Clears the pending bit and says whether it was set. */
int evtchn_take(uint32_t port);
/* Sleep until one of the ports is pending or the system time (ns; 0: for ever) has come. */
void evtchn_wait(const uint32_t *ports, unsigned count, uint64_t until);

/* Nanoseconds since the host booted, and seconds since 1970. */
uint64_t system_time(void);
uint64_t wall_clock(void);

/* The console. A full ring drops output unless console_patient is set. */
extern int console_patient;
void print(const char *what, ...) __attribute__((format(printf, 1, 2)));
void console_write(const char *text, size_t length);
size_t console_read(char *to, size_t size);

/* What every guest does: the line that says hello is its own. */
void guest_ready(void);
/* Obey a request of the toolstack if there is one; does not return from a shutdown. */
void guest_control(void);
/* How often the toolstack has changed the page since the boot. */
extern unsigned page_changes;
/* Leave: exit code, message, state, then the hypervisor is told. */
void guest_exit(unsigned reason, int code, const char *message) __attribute__((noreturn));

/* The guest. */
void guest_main(void);

#endif
