/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * TCP (RFC 9293) for a server that says one short thing and closes. What clients send is
 * acknowledged and dropped.
 *
 *            SYN                 ACK                   ACK of FIN         FIN
 *   (none) -------> SYN_RECEIVED ---> CLOSING_ACTIVE ------------> FIN_WAIT -----> TIME_WAIT
 *                                         | FIN first                                 ^
 *                                         +-----> CLOSING_BOTH ---- ACK of FIN -------+
 *
 * The text and the FIN are one stream of length + 1 sequence numbers that starts after the
 * SYN's; snd_nxt - iss - 1 says how much of it has been sent. A time-out goes back to snd_una.
 */
#include "net.h"

#define CONNECTIONS 128
#define TEXT        128
#define WINDOW      16384
#define HEADER      20
#define TRIES       7

#define FIN 0x01
#define SYN 0x02
#define RST 0x04
#define PSH 0x08
#define ACK 0x10

enum state { NONE, SYN_RECEIVED, CLOSING_ACTIVE, CLOSING_BOTH, FIN_WAIT, TIME_WAIT };

struct connection {
    enum state state;
    struct path path;
    uint16_t port, peer; /* ours and theirs */
    uint32_t iss, snd_una, snd_nxt, snd_wnd, rcv_nxt;
    uint32_t mss;
    uint32_t length;     /* of the text */
    uint32_t tries;
    uint64_t deadline;   /* retransmission, or the end of the state */
    char text[TEXT];
};

static struct connection connections[CONNECTIONS];
static uint64_t secret;

/* Sequence number comparison, modulo 2^32. */
static int after(uint32_t a, uint32_t b)
{
    return (int32_t)(a - b) > 0;
}

static uint64_t mix(uint64_t x)
{
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ul;
    x = (x ^ x >> 27) * 0x94d049bb133111ebul;
    return x ^ x >> 31;
}

/* A clock plus a keyed hash of the two ends (RFC 6528). */
static uint32_t initial_sequence(const struct path *path, uint16_t peer)
{
    uint64_t hash = secret;

    for (unsigned i = 0; i < 16; i += 4)
        hash = mix(hash ^ get32(path->remote + i) ^ (uint64_t)get32(path->local + i) << 32);
    return (uint32_t)(mix(hash ^ peer) + system_time() / 4096);
}

void tcp_open(void)
{
    secret = mix(system_time() ^ wall_clock() << 32 ^ (uint64_t)noxs.header.domid << 16);
    for (unsigned i = 0; i < sizeof(noxs.header.uuid); i++)
        secret = mix(secret ^ noxs.header.uuid[i]);
}

/* ---- Sending --------------------------------------------------------------------- */

struct segment {
    uint16_t port, peer;
    uint32_t seq, ack;
    uint8_t flags;
    uint32_t mss;       /* with SYN: ours; 0: no option */
    const char *data;
    uint32_t length;
};

static void send(const struct path *path, const struct segment *what)
{
    uint8_t *tcp = ip_begin(path);
    uint32_t header = HEADER + (what->mss ? 4 : 0);

    if (!tcp)
        return;
    put16(tcp, what->port);
    put16(tcp + 2, what->peer);
    put32(tcp + 4, what->seq);
    put32(tcp + 8, what->flags & ACK ? what->ack : 0);
    tcp[12] = (uint8_t)(header / 4 << 4);
    tcp[13] = what->flags;
    put16(tcp + 14, what->flags & RST ? 0 : WINDOW);
    put32(tcp + 16, 0);
    if (what->mss)
        put32(tcp + HEADER, 0x02040000 | what->mss);
    if (what->length)
        memcpy(tcp + header, what->data, what->length);
    put16(tcp + 16, ip_checksum(path, PROTOCOL_TCP, tcp, header + what->length));
    ip_send(path, PROTOCOL_TCP, header + what->length);
}

static void send_control(struct connection *c, uint8_t flags, uint32_t seq)
{
    send(&c->path, &(struct segment){.port = c->port, .peer = c->peer, .seq = seq,
                                     .ack = c->rcv_nxt, .flags = flags,
                                     .mss = flags & SYN ? ip_room(&c->path) - HEADER : 0});
}

/* Whatever of the stream the peer's window takes; with probe, one byte more than that. */
static void send_stream(struct connection *c, int probe)
{
    uint32_t end = c->iss + 1 + c->length; /* the FIN's number */

    while (!after(c->snd_nxt, end)) {
        uint32_t in_flight = c->snd_nxt - c->snd_una;
        uint32_t room = c->snd_wnd > in_flight ? c->snd_wnd - in_flight : 0;
        uint32_t length = end - c->snd_nxt;
        uint8_t flags = ACK;

        if (!room && probe && !in_flight)
            room = 1;
        if (!room)
            break;
        if (length > c->mss)
            length = c->mss;
        if (length >= room)
            length = room;
        else if (c->snd_nxt + length == end)
            flags |= FIN | PSH;
        send(&c->path,
             &(struct segment){.port = c->port, .peer = c->peer, .seq = c->snd_nxt,
                               .ack = c->rcv_nxt, .flags = flags,
                               .data = c->text + (c->snd_nxt - c->iss - 1), .length = length});
        c->snd_nxt += length + (flags & FIN ? 1 : 0);
    }
}

static void arm(struct connection *c)
{
    c->deadline = system_time() + (SECOND << c->tries);
}

static void reset(const struct path *path, const uint8_t *tcp, uint32_t length)
{
    uint8_t flags = tcp[13];

    if (flags & RST)
        return;
    send(path, &(struct segment){
                   .port = get16(tcp + 2), .peer = get16(tcp),
                   .seq = flags & ACK ? get32(tcp + 8) : 0,
                   .ack = get32(tcp + 4) + length + (flags & SYN ? 1 : 0) + (flags & FIN ? 1 : 0),
                   .flags = flags & ACK ? RST : RST | ACK});
}

/* ---- Connections ----------------------------------------------------------------- */

static struct connection *find(const struct path *path, uint16_t port, uint16_t peer)
{
    for (unsigned i = 0; i < CONNECTIONS; i++) {
        struct connection *c = &connections[i];

        if (c->state != NONE && c->peer == peer && c->port == port &&
            c->path.via == path->via && c->path.v6 == path->v6 &&
            !memcmp(c->path.remote, path->remote, 16) && !memcmp(c->path.local, path->local, 16))
            return c;
    }
    return NULL;
}

/* A free one; else the one in TIME_WAIT, else half open, that would end first. */
static struct connection *allocate(void)
{
    struct connection *best = NULL;

    for (unsigned i = 0; i < CONNECTIONS; i++) {
        struct connection *c = &connections[i];

        if (c->state == NONE)
            return c;
        if (c->state != TIME_WAIT && c->state != SYN_RECEIVED)
            continue;
        if (!best || (c->state == TIME_WAIT && best->state != TIME_WAIT) ||
            (c->state == best->state && c->deadline < best->deadline))
            best = c;
    }
    return best;
}

static uint32_t peer_mss(const uint8_t *tcp, uint32_t header)
{
    for (uint32_t at = HEADER; at + 1 < header && tcp[at];) {
        if (tcp[at] == 1) {
            at++;
            continue;
        }
        if (tcp[at + 1] < 2 || at + tcp[at + 1] > header)
            break;
        if (tcp[at] == 2 && tcp[at + 1] == 4 && get16(tcp + at + 2) >= 64)
            return get16(tcp + at + 2);
        at += tcp[at + 1];
    }
    return 536;
}

static void listen_input(const struct path *path, const uint8_t *tcp, uint32_t header,
                         uint32_t length)
{
    struct connection *c;

    if (tcp[13] & RST)
        return;
    if ((tcp[13] & (SYN | ACK)) != SYN || get16(tcp + 2) != PORT_DAYTIME) {
        reset(path, tcp, length);
        return;
    }
    c = allocate();
    if (!c)
        return;
    memset(c, 0, sizeof(*c));
    c->state = SYN_RECEIVED;
    c->path = *path;
    c->port = get16(tcp + 2);
    c->peer = get16(tcp);
    c->iss = initial_sequence(path, c->peer);
    c->snd_una = c->iss;
    c->snd_nxt = c->iss + 1;
    c->snd_wnd = get16(tcp + 14);
    c->rcv_nxt = get32(tcp + 4) + 1;
    c->mss = peer_mss(tcp, header);
    if (c->mss > ip_room(path) - HEADER)
        c->mss = ip_room(path) - HEADER;
    send_control(c, SYN | ACK, c->iss);
    arm(c);
}

static void wait_time(struct connection *c)
{
    c->state = TIME_WAIT;
    c->deadline = system_time() + 60 * SECOND;
}

static int acceptable(const struct connection *c, uint32_t seq, uint32_t length)
{
    if (!length)
        return seq - c->rcv_nxt < WINDOW;
    return seq - c->rcv_nxt < WINDOW || seq + length - 1 - c->rcv_nxt < WINDOW;
}

/* An acknowledgement of something sent. */
static void acknowledged(struct connection *c, uint32_t ack, uint32_t window)
{
    c->snd_wnd = window;
    if (!after(ack, c->snd_una))
        return;
    c->snd_una = ack;
    if (after(c->snd_una, c->snd_nxt))
        c->snd_nxt = c->snd_una;
    c->tries = 0;
    arm(c);
    if (ack != c->iss + 1 + c->length + 1)
        return;
    if (c->state == CLOSING_ACTIVE) {
        c->state = FIN_WAIT;
        c->deadline = system_time() + 60 * SECOND;
    } else if (c->state == CLOSING_BOTH) {
        wait_time(c);
    }
}

static void established_input(struct connection *c, const uint8_t *tcp, uint32_t length)
{
    uint32_t seq = get32(tcp + 4), ack = get32(tcp + 8), end = seq + length;
    uint32_t highest = c->state == SYN_RECEIVED ? c->iss + 1 : c->iss + 1 + c->length + 1;
    uint8_t flags = tcp[13];
    int answer = length > 0;

    if (!acceptable(c, seq, length + (flags & SYN ? 1 : 0) + (flags & FIN ? 1 : 0))) {
        if (flags & RST)
            return;
        if (c->state == SYN_RECEIVED && (flags & (SYN | ACK)) == SYN && seq + 1 == c->rcv_nxt)
            send_control(c, SYN | ACK, c->iss);
        else
            send_control(c, ACK, c->snd_nxt);
        return;
    }
    if (flags & RST) {
        /* Only an exact one: a guess gets a challenge (RFC 5961). */
        if (seq == c->rcv_nxt)
            c->state = NONE;
        else
            send_control(c, ACK, c->snd_nxt);
        return;
    }
    if (flags & SYN) {
        send_control(c, ACK, c->snd_nxt);
        return;
    }
    if (!(flags & ACK))
        return;
    if (after(ack, highest)) {
        if (c->state == SYN_RECEIVED)
            reset(&c->path, tcp, length);
        else
            send_control(c, ACK, c->snd_nxt);
        return;
    }
    if (c->state == SYN_RECEIVED) {
        if (ack != c->iss + 1)
            return;
        c->state = CLOSING_ACTIVE;
        c->length = daytime_text(c->text, TEXT);
        c->snd_una = c->snd_nxt = ack;
        c->tries = 0;
        arm(c);
    }
    if (!after(c->snd_una, ack))
        acknowledged(c, ack, get16(tcp + 14));
    /* Take what comes next in order, without keeping it; what comes early comes again. */
    if (!after(seq, c->rcv_nxt) && after(end, c->rcv_nxt))
        c->rcv_nxt = end;
    if ((flags & FIN) && end == c->rcv_nxt && c->state != CLOSING_BOTH && c->state != TIME_WAIT) {
        c->rcv_nxt++;
        answer = 1;
        if (c->state == FIN_WAIT)
            wait_time(c);
        else
            c->state = CLOSING_BOTH;
    } else if (flags & FIN) {
        answer = 1;
    }
    if (c->state == CLOSING_ACTIVE || c->state == CLOSING_BOTH) {
        uint32_t before = c->snd_nxt;

        send_stream(c, 0);
        if (c->snd_nxt != before)
            answer = 0;
    }
    if (answer)
        send_control(c, ACK, c->snd_nxt);
}

void tcp_input(const struct path *path, const uint8_t *tcp, uint32_t length)
{
    struct connection *c;
    uint32_t header;

    if (length < HEADER)
        return;
    header = (tcp[12] >> 4) * 4u;
    if (header < HEADER || header > length)
        return;
    length -= header;
    c = find(path, get16(tcp + 2), get16(tcp));
    /* A new connection between the same ports may cut TIME_WAIT short (RFC 9293, 3.10.7.4). */
    if (c && c->state == TIME_WAIT && (tcp[13] & (SYN | ACK | RST)) == SYN &&
        after(get32(tcp + 4), c->rcv_nxt)) {
        c->state = NONE;
        c = NULL;
    }
    if (c)
        established_input(c, tcp, length);
    else
        listen_input(path, tcp, header, length);
}

uint64_t tcp_timer(uint64_t now)
{
    uint64_t next = NEVER;

    for (unsigned i = 0; i < CONNECTIONS; i++) {
        struct connection *c = &connections[i];

        if (c->state == NONE)
            continue;
        if (c->deadline <= now) {
            if (c->state == FIN_WAIT || c->state == TIME_WAIT) {
                c->state = NONE;
                continue;
            }
            if (++c->tries >= TRIES) {
                if (c->state != SYN_RECEIVED)
                    send_control(c, RST | ACK, c->snd_nxt);
                c->state = NONE;
                continue;
            }
            if (c->state == SYN_RECEIVED) {
                send_control(c, SYN | ACK, c->iss);
            } else {
                c->snd_nxt = c->snd_una;
                send_stream(c, 1);
            }
            arm(c);
        }
        if (c->deadline < next)
            next = c->deadline;
    }
    return next;
}
