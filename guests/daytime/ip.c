/* SPDX-License-Identifier: BSD-2-Clause */
/* Ethernet, ARP (RFC 826), IPv4, IPv6 with neighbour discovery (RFC 4861), ICMP echo, UDP. */
#include "net.h"

#define ETHERNET   14
#define TYPE_IPV4  0x0800
#define TYPE_ARP   0x0806
#define TYPE_IPV6  0x86dd

#define ARP_SIZE 28
#define ARP_REQUEST 1
#define ARP_REPLY   2

#define PENDING_FRAMES 16
#define PENDING_SIZE   1536
#define KNOWN_FOR      (300 * SECOND)

static const uint8_t everyone[6] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff};
static uint8_t pending_pool[PENDING_FRAMES][PENDING_SIZE];
static uint8_t pending_used[PENDING_FRAMES];

/* ---- Checksums (RFC 1071) -------------------------------------------------------- */

static uint64_t add(uint64_t sum, const uint8_t *at, uint32_t length)
{
    for (; length > 1; at += 2, length -= 2)
        sum += get16(at);
    return length ? sum + (uint64_t)(at[0] << 8) : sum;
}

static uint16_t fold(uint64_t sum)
{
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    return (uint16_t)~sum;
}

uint16_t ip_sum(const uint8_t *bytes, uint32_t length)
{
    return fold(add(0, bytes, length));
}

uint16_t ip_checksum(const struct path *path, uint8_t protocol, const uint8_t *payload,
                     uint32_t length)
{
    uint32_t size = path->v6 ? 16 : 4;
    uint64_t sum = (uint64_t)protocol + length;

    sum = add(sum, path->local, size);
    sum = add(sum, path->remote, size);
    return fold(add(sum, payload, length));
}

/* ---- Neighbours ------------------------------------------------------------------ */

static int same(const uint8_t *a, const uint8_t *b, uint32_t length)
{
    return !memcmp(a, b, length);
}

static uint32_t address_size(int v6)
{
    return v6 ? 16 : 4;
}

static void ethernet(struct interface *on, uint8_t *frame, const uint8_t *to, uint16_t type)
{
    memcpy(frame, to, 6);
    memcpy(frame + 6, on->mac, 6);
    put16(frame + 12, type);
}

static void send_arp(struct interface *on, uint16_t operation, const uint8_t *to_mac,
                     const uint8_t *target_mac, const uint8_t *target)
{
    uint8_t *frame = noxs_net_frame(&on->net), *arp;

    if (!frame)
        return;
    ethernet(on, frame, to_mac, TYPE_ARP);
    arp = frame + ETHERNET;
    put16(arp, 1);
    put16(arp + 2, TYPE_IPV4);
    arp[4] = 6;
    arp[5] = 4;
    put16(arp + 6, operation);
    memcpy(arp + 8, on->mac, 6);
    memcpy(arp + 14, on->ipv4, 4);
    memcpy(arp + 18, target_mac, 6);
    memcpy(arp + 24, target, 4);
    noxs_net_send(&on->net, ETHERNET + ARP_SIZE, 0);
}

/* The multicast address that a solicitation for this address goes to. */
static void solicited_node(uint8_t *to, const uint8_t *address)
{
    static const uint8_t prefix[13] = {0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff};

    memcpy(to, prefix, 13);
    memcpy(to + 13, address + 13, 3);
}

static void ipv6_header(uint8_t *ip, const struct path *path, uint8_t protocol, uint32_t length)
{
    put32(ip, 6u << 28);
    put16(ip + 4, length);
    ip[6] = protocol;
    ip[7] = 255;
    memcpy(ip + 8, path->local, 16);
    memcpy(ip + 24, path->remote, 16);
}

/* A solicitation (135) or advertisement (136), with our link-layer address. */
static void send_neighbour(const struct path *path, uint8_t type, uint32_t flags,
                           const uint8_t *target, const uint8_t *to_mac)
{
    struct interface *on = path->via;
    uint8_t *frame = noxs_net_frame(&on->net), *icmp;

    if (!frame)
        return;
    ethernet(on, frame, to_mac, TYPE_IPV6);
    ipv6_header(frame + ETHERNET, path, PROTOCOL_ICMPV6, 32);
    icmp = frame + ETHERNET + 40;
    memset(icmp, 0, 32);
    icmp[0] = type;
    put32(icmp + 4, flags);
    memcpy(icmp + 8, target, 16);
    icmp[24] = type == 135 ? 1 : 2;
    icmp[25] = 1;
    memcpy(icmp + 26, on->mac, 6);
    put16(icmp + 2, ip_checksum(path, PROTOCOL_ICMPV6, icmp, 32));
    noxs_net_send(&on->net, ETHERNET + 40 + 32, 0);
}

static void multicast_mac(uint8_t *mac, const uint8_t *address)
{
    put16(mac, 0x3333);
    memcpy(mac + 2, address + 12, 4);
}

static void ask(struct interface *on, struct neighbour *who, uint64_t now)
{
    static const uint8_t nobody[6];
    uint8_t mac[6];

    who->tries++;
    who->deadline = now + SECOND;
    if (who->v6) {
        struct path path = {.via = on, .v6 = 1};

        memcpy(path.local, on->has6 ? on->ipv6 : on->link_local, 16);
        solicited_node(path.remote, who->address);
        multicast_mac(mac, path.remote);
        send_neighbour(&path, 135, 0, who->address, mac);
    } else {
        send_arp(on, ARP_REQUEST, everyone, nobody, who->address);
    }
}

static void drop_pending(struct neighbour *who)
{
    if (who->pending)
        pending_used[(who->pending - pending_pool[0]) / PENDING_SIZE] = 0;
    who->pending = NULL;
}

static struct neighbour *find(struct interface *on, int v6, const uint8_t *address)
{
    for (unsigned i = 0; i < NEIGHBOURS; i++) {
        struct neighbour *who = &on->neighbours[i];

        if (who->state != NEIGHBOUR_FREE && who->v6 == v6 &&
            same(who->address, address, address_size(v6)))
            return who;
    }
    return NULL;
}

/* A free entry, or the one that would go first anyway. */
static struct neighbour *make(struct interface *on, int v6, const uint8_t *address)
{
    struct neighbour *oldest = &on->neighbours[0];

    for (unsigned i = 0; i < NEIGHBOURS; i++) {
        struct neighbour *who = &on->neighbours[i];

        if (who->state == NEIGHBOUR_FREE) {
            oldest = who;
            break;
        }
        if (who->deadline < oldest->deadline)
            oldest = who;
    }
    drop_pending(oldest);
    memset(oldest, 0, sizeof(*oldest));
    oldest->v6 = (uint8_t)v6;
    memcpy(oldest->address, address, address_size(v6));
    return oldest;
}

static void learn(struct interface *on, int v6, const uint8_t *address, const uint8_t *mac)
{
    struct neighbour *who = find(on, v6, address);

    if (mac[0] & 1)
        return;
    if (!who)
        who = make(on, v6, address);
    memcpy(who->mac, mac, 6);
    who->state = NEIGHBOUR_KNOWN;
    who->tries = 0;
    who->deadline = system_time() + KNOWN_FOR;
    if (who->pending) {
        uint8_t *frame = noxs_net_frame(&on->net);

        if (frame) {
            memcpy(frame, who->pending, who->pending_length);
            memcpy(frame, mac, 6);
            noxs_net_send(&on->net, who->pending_length, 0);
        }
        drop_pending(who);
    }
}

static void keep_pending(struct neighbour *who, const uint8_t *frame, uint32_t length)
{
    if (length > PENDING_SIZE)
        return;
    for (unsigned i = 0; i < PENDING_FRAMES && !who->pending; i++)
        if (!pending_used[i]) {
            pending_used[i] = 1;
            who->pending = pending_pool[i];
        }
    if (!who->pending)
        return;
    memcpy(who->pending, frame, length);
    who->pending_length = (uint16_t)length;
}

uint64_t ip_timer(struct interface *on, uint64_t now)
{
    uint64_t next = NEVER;

    for (unsigned i = 0; i < NEIGHBOURS; i++) {
        struct neighbour *who = &on->neighbours[i];

        if (who->state == NEIGHBOUR_FREE)
            continue;
        if (who->deadline <= now) {
            if (who->state == NEIGHBOUR_ASKED && who->tries < 4) {
                ask(on, who, now);
            } else {
                drop_pending(who);
                who->state = NEIGHBOUR_FREE;
                continue;
            }
        }
        if (who->deadline < next)
            next = who->deadline;
    }
    return next;
}

/* ---- Sending --------------------------------------------------------------------- */

static uint32_t header_size(const struct path *path)
{
    return path->v6 ? 40 : 20;
}

uint32_t ip_room(const struct path *path)
{
    uint32_t mtu = path->via->net.vif.mtu, most = NOXS_PAGE_SIZE - ETHERNET;

    if (mtu < 576)
        mtu = 576;
    return (mtu < most ? mtu : most) - header_size(path);
}

uint8_t *ip_begin(const struct path *path)
{
    uint8_t *frame = noxs_net_frame(&path->via->net);

    return frame ? frame + ETHERNET + header_size(path) : NULL;
}

static int on_link(const uint8_t *a, const uint8_t *b, unsigned prefix)
{
    unsigned bytes = prefix / 8, bits = prefix % 8;

    return same(a, b, bytes) && (!bits || !((a[bytes] ^ b[bytes]) >> (8 - bits)));
}

static int any(const uint8_t *bytes, unsigned count)
{
    while (count--)
        if (bytes[count])
            return 1;
    return 0;
}

static const uint8_t *next_hop(const struct path *path)
{
    const struct interface *on = path->via;
    const uint8_t *to = path->remote, *gateway;

    if (path->v6) {
        if ((to[0] == 0xfe && (to[1] & 0xc0) == 0x80) ||
            (on->has6 && on_link(to, on->ipv6, on->prefix6)))
            return to;
        gateway = on->gateway6;
    } else {
        if (on_link(to, on->ipv4, on->prefix4))
            return to;
        gateway = on->gateway4;
    }
    return any(gateway, address_size(path->v6)) ? gateway : NULL;
}

void ip_send(const struct path *path, uint8_t protocol, uint32_t length)
{
    struct interface *on = path->via;
    uint8_t *frame = noxs_net_frame(&on->net), *ip;
    const uint8_t *hop = next_hop(path);
    uint32_t size = ETHERNET + header_size(path) + length;
    struct neighbour *who;

    if (!frame || !hop)
        return;
    ip = frame + ETHERNET;
    if (path->v6) {
        ipv6_header(ip, path, protocol, length);
        ip[7] = protocol == PROTOCOL_ICMPV6 ? 255 : 64;
    } else {
        put16(ip, 0x4500);
        put16(ip + 2, 20 + length);
        put16(ip + 4, on->next_id++);
        put16(ip + 6, 0x4000);
        ip[8] = 64;
        ip[9] = protocol;
        put16(ip + 10, 0);
        memcpy(ip + 12, path->local, 4);
        memcpy(ip + 16, path->remote, 4);
        put16(ip + 10, ip_sum(ip, 20));
    }
    who = find(on, path->v6, hop);
    ethernet(on, frame, who ? who->mac : everyone, path->v6 ? TYPE_IPV6 : TYPE_IPV4);
    if (who && who->state == NEIGHBOUR_KNOWN) {
        noxs_net_send(&on->net, size, 0);
        return;
    }
    if (!who) {
        who = make(on, path->v6, hop);
        who->state = NEIGHBOUR_ASKED;
    }
    keep_pending(who, frame, size);
    if (!who->tries)
        ask(on, who, system_time());
}

void ip_announce(struct interface *on)
{
    static const uint8_t all_nodes[16] = {0xff, 2, [15] = 1};
    static const uint8_t nobody[6];
    struct path path = {.via = on, .v6 = 1};
    uint8_t mac[6];

    if (on->has4)
        send_arp(on, ARP_REQUEST, everyone, nobody, on->ipv4);
    if (on->has6) {
        memcpy(path.local, on->ipv6, 16);
        memcpy(path.remote, all_nodes, 16);
        multicast_mac(mac, all_nodes);
        send_neighbour(&path, 136, 0x20000000, on->ipv6, mac);
    }
}

/* ---- Receiving ------------------------------------------------------------------- */

static void arp_input(struct interface *on, const uint8_t *arp, uint32_t length)
{
    const uint8_t *sender = arp + 14, *sender_mac = arp + 8;

    if (length < ARP_SIZE || get16(arp) != 1 || get16(arp + 2) != TYPE_IPV4 || arp[4] != 6 ||
        arp[5] != 4 || !on->has4 || same(sender, on->ipv4, 4))
        return;
    /* One who asks for us will hear from us; of others only what is already known may change. */
    if (any(sender, 4) && (same(arp + 24, on->ipv4, 4) || find(on, 0, sender)))
        learn(on, 0, sender, sender_mac);
    if (!same(arp + 24, on->ipv4, 4))
        return;
    if (get16(arp + 6) == ARP_REQUEST)
        send_arp(on, ARP_REPLY, sender_mac, sender_mac, sender);
}

static void icmp_input(const struct path *path, const uint8_t *icmp, uint32_t length)
{
    uint8_t *reply;

    if (length < 8 || ip_sum(icmp, length) || length > ip_room(path))
        return;
    if (icmp[0] == 0)
        ping_reply(path, icmp, length);
    if (icmp[0] != 8)
        return;
    reply = ip_begin(path);
    if (!reply)
        return;
    memcpy(reply, icmp, length);
    put32(reply, 0);
    put16(reply + 2, ip_sum(reply, length));
    ip_send(path, PROTOCOL_ICMP, length);
}

static void icmpv6_input(const struct path *path, const uint8_t *icmp, uint32_t length,
                         int from_link)
{
    struct interface *on = path->via;
    uint8_t *reply;

    if (length < 8)
        return;
    if (icmp[0] == 128) {
        if (path->local[0] == 0xff || length > ip_room(path))
            return;
        reply = ip_begin(path);
        if (!reply)
            return;
        memcpy(reply, icmp, length);
        reply[0] = 129;
        put16(reply + 2, 0);
        put16(reply + 2, ip_checksum(path, PROTOCOL_ICMPV6, reply, length));
        ip_send(path, PROTOCOL_ICMPV6, length);
        return;
    }
    if (!from_link || length < 24 || icmp[1])
        return;
    for (uint32_t at = 24; at + 8 <= length && icmp[at + 1]; at += 8u * icmp[at + 1])
        if (icmp[at] == (icmp[0] == 135 ? 1 : 2) && icmp[at + 1] == 1) {
            if (icmp[0] == 135 && any(path->remote, 16))
                learn(on, 1, path->remote, icmp + at + 2);
            if (icmp[0] == 136 && find(on, 1, icmp + 8))
                learn(on, 1, icmp + 8, icmp + at + 2);
        }
    if (icmp[0] == 135 &&
        (same(icmp + 8, on->link_local, 16) || (on->has6 && same(icmp + 8, on->ipv6, 16)))) {
        struct path back = {.via = on, .v6 = 1};
        struct neighbour *who = find(on, 1, path->remote);
        uint8_t mac[6];

        memcpy(back.local, icmp + 8, 16);
        if (who && who->state == NEIGHBOUR_KNOWN) {
            memcpy(back.remote, path->remote, 16);
            send_neighbour(&back, 136, 0x60000000, icmp + 8, who->mac);
        } else if (!any(path->remote, 16)) {
            /* Somebody tries whether the address is taken (RFC 4862): everyone hears it is. */
            back.remote[0] = 0xff;
            back.remote[1] = 2;
            back.remote[15] = 1;
            multicast_mac(mac, back.remote);
            send_neighbour(&back, 136, 0x20000000, icmp + 8, mac);
        }
    }
}

/* Nobody listens there. At most a hundred a second: errors must not amplify. */
static void port_unreachable(const struct path *path, const uint8_t *ip, uint32_t length)
{
    uint32_t most = path->v6 ? 1232 : 548;
    uint64_t now = system_time();
    uint8_t *icmp;

    if (now < path->via->unreachable_after)
        return;
    path->via->unreachable_after = now + SECOND / 100;
    if (length > most)
        length = most;
    icmp = ip_begin(path);
    if (!icmp)
        return;
    memset(icmp, 0, 8);
    icmp[0] = path->v6 ? 1 : 3;
    icmp[1] = path->v6 ? 4 : 3;
    memcpy(icmp + 8, ip, length);
    put16(icmp + 2, path->v6 ? ip_checksum(path, PROTOCOL_ICMPV6, icmp, 8 + length)
                             : ip_sum(icmp, 8 + length));
    ip_send(path, path->v6 ? PROTOCOL_ICMPV6 : PROTOCOL_ICMP, 8 + length);
}

static void udp_input(const struct path *path, const uint8_t *ip, const uint8_t *udp,
                      uint32_t length)
{
    uint32_t text;
    uint16_t sum;
    uint8_t *reply;

    if (length < 8 || !get16(udp) || get16(udp + 4) < 8 || get16(udp + 4) > length)
        return;
    if (get16(udp + 2) != PORT_DAYTIME) {
        port_unreachable(path, ip, (uint32_t)(udp - ip) + length);
        return;
    }
    /* Two such servers must not talk to each other for ever (RFC 867 is silent on that). */
    if (get16(udp) == PORT_DAYTIME)
        return;
    reply = ip_begin(path);
    if (!reply)
        return;
    text = daytime_text((char *)reply + 8, 128);
    put16(reply, PORT_DAYTIME);
    put16(reply + 2, get16(udp));
    put16(reply + 4, 8 + text);
    put16(reply + 6, 0);
    sum = ip_checksum(path, PROTOCOL_UDP, reply, 8 + text);
    put16(reply + 6, sum ? sum : 0xffff);
    ip_send(path, PROTOCOL_UDP, 8 + text);
}

/*
 * A blank checksum comes from the same host, and a validated one has been looked at: there is
 * nothing more to check. UDP over IPv4 may go without.
 */
static int sound(const struct path *path, uint8_t protocol, const uint8_t *payload,
                 uint32_t length, uint32_t flags)
{
    if (flags & (NOXS_NET_BLANK | NOXS_NET_VALID))
        return 1;
    if (protocol == PROTOCOL_UDP && !path->v6 && length >= 8 && !get16(payload + 6))
        return 1;
    return !ip_checksum(path, protocol, payload, length);
}

static void dispatch(const struct path *path, uint8_t protocol, const uint8_t *ip,
                     const uint8_t *payload, uint32_t length, uint32_t flags, int from_link)
{
    if (protocol == PROTOCOL_ICMP && !path->v6) {
        icmp_input(path, payload, length);
        return;
    }
    if (protocol == PROTOCOL_UDP && length >= 8 && get16(payload + 4) >= 8 &&
        get16(payload + 4) < length)
        length = get16(payload + 4);
    if (!sound(path, protocol, payload, length, flags))
        return;
    if (protocol == PROTOCOL_ICMPV6 && path->v6) {
        icmpv6_input(path, payload, length, from_link);
        return;
    }
    if (path->v6 && path->local[0] == 0xff)
        return;
    if (protocol == PROTOCOL_UDP)
        udp_input(path, ip, payload, length);
    else if (protocol == PROTOCOL_TCP)
        tcp_input(path, payload, length);
}

static void ipv4_input(struct interface *on, const uint8_t *ip, uint32_t length, uint32_t flags)
{
    uint32_t header, total;
    struct path path = {.via = on};

    if (length < 20 || ip[0] >> 4 != 4 || !on->has4)
        return;
    header = (ip[0] & 15) * 4u;
    total = get16(ip + 2);
    if (header < 20 || total < header || total > length || ip_sum(ip, header) ||
        (get16(ip + 6) & 0x3fff) || !same(ip + 16, on->ipv4, 4))
        return;
    /* Answers go to single hosts only. */
    if (ip[12] >= 224 || ip[12] == 127 || !ip[12] || same(ip + 12, on->ipv4, 4))
        return;
    memcpy(path.local, ip + 16, 4);
    memcpy(path.remote, ip + 12, 4);
    dispatch(&path, ip[9], ip, ip + header, total - header, flags, 0);
}

static void ipv6_input(struct interface *on, const uint8_t *ip, uint32_t length, uint32_t flags)
{
    struct path path = {.via = on, .v6 = 1};
    uint32_t total;

    if (length < 40 || ip[0] >> 4 != 6 || !on->has6)
        return;
    total = get16(ip + 4);
    if (total > length - 40 || ip[8] == 0xff)
        return;
    if (ip[24] != 0xff && !same(ip + 24, on->ipv6, 16) && !same(ip + 24, on->link_local, 16))
        return;
    memcpy(path.local, ip + 24, 16);
    memcpy(path.remote, ip + 8, 16);
    dispatch(&path, ip[6], ip, ip + 40, total, flags, ip[7] == 255);
}

void ip_input(struct interface *on, const uint8_t *frame, uint32_t length, uint32_t flags)
{
    if (length < ETHERNET || (!(frame[0] & 1) && !same(frame, on->mac, 6)))
        return;
    frame += ETHERNET;
    length -= ETHERNET;
    switch (get16(frame - 2)) {
    case TYPE_ARP:
        arp_input(on, frame, length);
        break;
    case TYPE_IPV4:
        ipv4_input(on, frame, length, flags);
        break;
    case TYPE_IPV6:
        ipv6_input(on, frame, length, flags);
        break;
    }
}

void interface_open(struct interface *on, const struct noxs_vif *vif)
{
    memcpy(on->mac, vif->mac, 6);
    memcpy(on->ipv4, vif->ipv4, 4);
    memcpy(on->gateway4, vif->ipv4_gateway, 4);
    memcpy(on->ipv6, vif->ipv6, 16);
    memcpy(on->gateway6, vif->ipv6_gateway, 16);
    on->prefix4 = vif->ipv4_prefix <= 32 ? vif->ipv4_prefix : 32;
    on->prefix6 = vif->ipv6_prefix <= 128 ? vif->ipv6_prefix : 128;
    on->has4 = (uint8_t)any(vif->ipv4, 4);
    on->has6 = (uint8_t)any(vif->ipv6, 16);
    /* The interface identifier from the MAC (RFC 4291, appendix A). */
    on->link_local[0] = 0xfe;
    on->link_local[1] = 0x80;
    memcpy(on->link_local + 8, on->mac, 3);
    on->link_local[8] ^= 2;
    put16(on->link_local + 11, 0xfffe);
    memcpy(on->link_local + 13, on->mac + 3, 3);
}
