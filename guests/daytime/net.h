/* SPDX-License-Identifier: BSD-2-Clause */
/* A small host's network stack: ARP, IPv4, IPv6 with neighbour discovery, ICMP, UDP, TCP. */
#ifndef NET_H
#define NET_H

#include <stddef.h>
#include <stdint.h>

#include "../common/lib.h"
#include "../common/platform.h"

#define MAX_INTERFACES 16
#define NEIGHBOURS     16

#define SECOND 1000000000ul
#define NEVER  UINT64_MAX

#define PROTOCOL_ICMP   1
#define PROTOCOL_TCP    6
#define PROTOCOL_UDP    17
#define PROTOCOL_ICMPV6 58

#define PORT_DAYTIME 13

struct neighbour {
    enum { NEIGHBOUR_FREE, NEIGHBOUR_ASKED, NEIGHBOUR_KNOWN } state;
    uint8_t v6, tries;
    uint8_t address[16];
    uint8_t mac[6];
    uint64_t deadline;     /* to ask again, or to forget */
    uint8_t *pending;      /* one frame that waits for the answer, from a common pool */
    uint16_t pending_length;
};

struct interface {
    struct noxs_net net;
    uint8_t mac[6];
    uint8_t ipv4[4], gateway4[4];
    uint8_t ipv6[16], gateway6[16], link_local[16];
    uint8_t prefix4, prefix6;
    uint8_t has4, has6;
    uint16_t next_id;
    uint64_t unreachable_after; /* paces the ICMP errors sent */
    struct neighbour neighbours[NEIGHBOURS];
};

/* Between two addresses; an IPv4 address takes the first four bytes. */
struct path {
    struct interface *via;
    uint8_t v6;
    uint8_t local[16], remote[16];
};

static inline uint16_t get16(const uint8_t *at)
{
    return (uint16_t)(at[0] << 8 | at[1]);
}

static inline uint32_t get32(const uint8_t *at)
{
    return (uint32_t)get16(at) << 16 | get16(at + 2);
}

static inline void put16(uint8_t *at, uint32_t value)
{
    at[0] = (uint8_t)(value >> 8);
    at[1] = (uint8_t)value;
}

static inline void put32(uint8_t *at, uint32_t value)
{
    put16(at, value >> 16);
    put16(at + 2, value);
}

/* ip.c */
void interface_open(struct interface *on, const struct noxs_vif *vif);
/* A frame came in; NOXS_NET_* flags say what is known of its checksum. */
void ip_input(struct interface *on, const uint8_t *frame, uint32_t length, uint32_t flags);
/* Tell the link who is here. */
void ip_announce(struct interface *on);
/* Where to put a payload, or NULL when nothing can be sent now; then send it. */
uint8_t *ip_begin(const struct path *path);
void ip_send(const struct path *path, uint8_t protocol, uint32_t length);
/* The largest payload that ip_send() takes. */
uint32_t ip_room(const struct path *path);
/* The checksum of a TCP, UDP or ICMPv6 payload whose own checksum field is 0; 0 if it is right. */
uint16_t ip_checksum(const struct path *path, uint8_t protocol, const uint8_t *payload,
                     uint32_t length);
/* The same without a pseudo header, for ICMP and IPv4's own. */
uint16_t ip_sum(const uint8_t *bytes, uint32_t length);
/* Ask again, forget; returns when to be called next. */
uint64_t ip_timer(struct interface *on, uint64_t now);

/* tcp.c */
void tcp_open(void);
void tcp_input(const struct path *path, const uint8_t *segment, uint32_t length);
uint64_t tcp_timer(uint64_t now);

/* ping.c */
void ping_open(struct interface *on);
void ping_reply(const struct path *path, const uint8_t *icmp, uint32_t length);
uint64_t ping_timer(uint64_t now);

/* daytime.c */
uint32_t daytime_text(char *to, uint32_t size);

#endif
