/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Pings somebody, for guests that show each other that they are there:
 *
 *   ping=A.B.C.D   whom
 *   count=N        how often (10), ten times a second once it is answered
 */
#include "net.h"

#define INTERVAL (SECOND / 10)
#define PATIENCE (2 * SECOND)
#define SIZE     64

static struct path path;
static uint16_t sent, received, count;
static uint8_t seen[65536 / 8];
static uint64_t due = NEVER;

static int parse(const char *text, uint8_t *address)
{
    unsigned part = 0, value = 0, digits = 0;

    for (;; text++) {
        if (*text >= '0' && *text <= '9') {
            value = value * 10 + (unsigned)(*text - '0');
            if (++digits > 3 || value > 255)
                return 0;
            continue;
        }
        if (!digits || part == 4)
            return 0;
        address[part++] = (uint8_t)value;
        value = digits = 0;
        if (*text != '.')
            return part == 4 && !*text;
    }
}

void ping_open(struct interface *on)
{
    char text[32];

    if (!on->has4 || !option_text("ping", text, sizeof(text)))
        return;
    path.via = on;
    memcpy(path.local, on->ipv4, 4);
    if (!parse(text, path.remote)) {
        print("ping: %s is no address\n", text);
        return;
    }
    count = (uint16_t)option_number("count", 10);
    due = system_time();
}

void ping_reply(const struct path *from, const uint8_t *icmp, uint32_t length)
{
    uint16_t number = get16(icmp + 6);

    if (length != SIZE || get16(icmp + 4) != noxs.header.domid || number >= sent ||
        from->via != path.via || memcmp(from->remote, path.remote, 4) ||
        seen[number / 8] & 1 << number % 8)
        return;
    seen[number / 8] |= (uint8_t)(1 << number % 8);
    received++;
    /* The way is known, or all are back: go on now rather than when patience ends. */
    if ((received == 1 && sent < count) || received == count)
        due = 0;
}

uint64_t ping_timer(uint64_t now)
{
    uint8_t *icmp;

    if (due > now)
        return due;
    if (sent == count) {
        print("ping: %u sent, %u received\n", sent, received);
        return due = NEVER;
    }
    icmp = ip_begin(&path);
    if (icmp) {
        memset(icmp, 0x55, SIZE);
        put32(icmp, 0x08000000);
        put16(icmp + 4, noxs.header.domid);
        put16(icmp + 6, sent++);
        put16(icmp + 2, ip_sum(icmp, SIZE));
        ip_send(&path, PROTOCOL_ICMP, SIZE);
    }
    /* Until the first is answered, others would take its place in the queue for an address. */
    return due = now + (sent == count || !received ? PATIENCE : INTERVAL);
}
