/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * A daytime server (RFC 867) on TCP and UDP port 13, on every vif of the device page, with the
 * addresses that the page gives it. With ping=ADDRESS on its command line it pings, too.
 */
#include "net.h"

static struct interface interfaces[MAX_INTERFACES];
static unsigned interface_count;
/* Jumbo frames come in several ring slots and are put together here. */
static uint8_t frame[65536 + 18];

/* Civil date from days since 1970-01-01: eras of 400 years, years from March. */
uint32_t daytime_text(char *to, uint32_t size)
{
    static const char *const weekdays[] = {"Thursday", "Friday", "Saturday", "Sunday",
                                           "Monday", "Tuesday", "Wednesday"};
    static const char *const months[] = {"January", "February", "March", "April",
                                         "May", "June", "July", "August",
                                         "September", "October", "November", "December"};
    uint64_t now = wall_clock(), days = now / 86400, seconds = now % 86400;
    uint64_t shifted = days + 719468, era = shifted / 146097, day_of_era = shifted % 146097;
    uint64_t year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36524 - day_of_era / 146096) / 365;
    uint64_t day_of_year =
        day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    uint64_t month = (5 * day_of_year + 2) / 153;
    uint64_t day = day_of_year - (153 * month + 2) / 5 + 1;
    uint64_t civil = month < 10 ? month + 2 : month - 10; /* 0 is January */
    uint64_t year = era * 400 + year_of_era + (civil < 2);
    size_t length = format(to, size, "%s, %s %lu, %lu %02lu:%02lu:%02lu-UTC\r\n",
                           weekdays[days % 7], months[civil], day, year, seconds / 3600,
                           seconds / 60 % 60, seconds % 60);

    return (uint32_t)(length < size ? length : size - 1);
}

static void open_interfaces(void)
{
    struct noxs_vif vif;
    unsigned buffers, count = 0;

    while (count < MAX_INTERFACES && noxs_vif(&noxs, count, &vif) == 0)
        count++;
    if (!count)
        return;
    /* Share what memory there is, a third of it for sending. */
    buffers = (platform.heap_end - platform.heap) * 3 / 4 / count;
    if (buffers > 192)
        buffers = 192;
    for (unsigned i = 0; i < count; i++) {
        struct interface *on = &interfaces[interface_count];
        int error;

        if (noxs_vif(&noxs, i, &vif))
            continue;
        interface_open(on, &vif);
        error = noxs_net_open(&on->net, &noxs, &vif, 0, buffers * 2 / 3, buffers / 3);
        if (error) {
            print("daytime: vif %u: error %d\n", vif.dev.handle, -error);
            continue;
        }
        interface_count++;
        print("daytime: vif %u %02x:%02x:%02x:%02x:%02x:%02x %u.%u.%u.%u/%u, %u buffers in, "
              "%u out\n",
              vif.dev.handle, on->mac[0], on->mac[1], on->mac[2], on->mac[3], on->mac[4],
              on->mac[5], on->ipv4[0], on->ipv4[1], on->ipv4[2], on->ipv4[3], on->prefix4,
              on->net.rx_count, on->net.tx_count);
    }
}

/* Frames of one interface, a bounded number; says whether it had fewer than that. */
static int receive(struct interface *on)
{
    for (unsigned budget = 64; budget; budget--) {
        uint32_t flags, length;

        /* Without a page to answer in, leave the question in the ring. */
        if (!noxs_net_frame(&on->net))
            return 1;
        length = noxs_net_receive(&on->net, frame, sizeof(frame), &flags);
        if (!length)
            return 1;
        ip_input(on, frame, length, flags);
    }
    return 0;
}

void guest_main(void)
{
    uint32_t ports[2 + 2 * MAX_INTERFACES];
    unsigned count = 0;

    if (have_noxs) {
        open_interfaces();
        tcp_open();
    }
    for (unsigned i = 0; i < interface_count; i++)
        ip_announce(&interfaces[i]);
    if (interface_count)
        ping_open(&interfaces[0]);
    print("daytime: %u interfaces\n", interface_count);
    guest_ready();

    if (platform.store_evtchn)
        ports[count++] = platform.store_evtchn;
    for (unsigned i = 0; i < interface_count; i++) {
        const struct noxs_vif_queue *queue = &interfaces[i].net.queue;

        ports[count++] = queue->rx_evtchn;
        if (queue->tx_evtchn != queue->rx_evtchn)
            ports[count++] = queue->tx_evtchn;
    }
    for (;;) {
        uint64_t now, next, at;
        int idle = 1;

        for (unsigned i = 0; i < count; i++)
            evtchn_take(ports[i]);
        guest_control();
        for (unsigned i = 0; i < interface_count; i++)
            idle &= receive(&interfaces[i]);
        now = system_time();
        next = tcp_timer(now);
        at = ping_timer(now);
        if (at < next)
            next = at;
        for (unsigned i = 0; i < interface_count; i++) {
            at = ip_timer(&interfaces[i], now);
            if (at < next)
                next = at;
        }
        if (idle)
            evtchn_wait(ports, count, next == NEVER ? 0 : next);
    }
}

NOXS_ELF_NOTE();
