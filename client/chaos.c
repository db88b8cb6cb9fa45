/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * The command `chaos`: has chaosd run the verb, or runs the Python command `chaos-python`.
 * The daemon gets the arguments, the environment that matters, and four descriptors: the standard
 * streams and the working directory. It answers with the exit status, or with EXEC for a verb
 * that is not its own. docs/protocol.md, "run", is the contract.
 *
 * No C library: a static glibc takes more page faults for its own start than all of this does.
 */
#define _GNU_SOURCE /* O_PATH */
#include <asm/ioctls.h>
#include <asm/termbits.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>

#define PYTHON    "chaos-python"
#define FRAME_MAX (1u << 20) /* chaos/frames.py, as VERSION and the kinds of replies */
#define VERSION   "\x01"
enum { OK, ERROR, PROGRESS, EXEC };

/* ---- The kernel, by the x86_64 system call ABI: a negative result is an error number -------- */
__asm__(".globl _start\n_start: xor %ebp, %ebp; mov %rsp, %rdi; and $-16, %rsp; call start\n"
        "restore: mov $15, %eax; syscall\n"); /* rt_sigreturn */
extern void restore(void);

static long sys(long number, long a, long b, long c, long d) {
    register long r10 __asm__("r10") = d;
    __asm__ volatile("syscall" : "+a"(number) : "D"(a), "S"(b), "d"(c), "r"(r10)
                     : "rcx", "r11", "memory");
    return number;
}
static _Noreturn void leave(int status) {
    for (;;)
        sys(SYS_exit_group, status, 0, 0, 0);
}

/* "chaos: MESSAGE (HINT)"; the hint may be empty. A terminal that the daemon made raw is restored,
 * unless it is another job's now. */
static struct termios terminal;
static _Noreturn void fail(int status, struct iovec message, struct iovec hint) {
    struct iovec parts[] = {{"chaos: ", 7}, message, {" (", 2}, hint, {")\n", 2}};
    int job = 0;
    if (terminal.c_cflag && !sys(SYS_ioctl, 0, TIOCGPGRP, (long)&job, 0) &&
        job == sys(SYS_getpgrp, 0, 0, 0, 0))
        sys(SYS_ioctl, 0, TCSETS, (long)&terminal, 0);
    if (!hint.iov_len)
        parts[2] = (struct iovec){"\n", 1};
    sys(SYS_writev, 2, (long)parts, hint.iov_len ? 5 : 3, 0);
    leave(status);
}
#define TEXT(s) ((struct iovec){s, sizeof(s) - 1})

static void copy(void *to, const void *from, size_t length) {
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(length) : : "memory");
}
static size_t length_of(const char *s) {
    size_t n = 0;
    while (s[n])
        n++;
    return n;
}
static int begins(const char *s, const char *with) {
    while (*with && *s == *with)
        s++, with++;
    return !*with;
}

/* The value of the variable that is given as "NAME=", or "". */
static const char *variable(char **env, const char *name) {
    while (*env && !begins(*env, name))
        env++;
    return *env ? *env + length_of(name) : "";
}

/* ---- The Python command: the one beside this file, else one on PATH ------------------------- */
static void try_python(const char *folder, long length, char **argv, char **env) {
    static char path[4096 + sizeof "/" PYTHON];
    if (length <= 0 || length > 4096 || folder[0] != '/')
        return;
    copy(path, folder, length);
    copy(path + length, "/" PYTHON, sizeof "/" PYTHON);
    sys(SYS_execve, (long)path, (long)argv, (long)env, 0);
}
static _Noreturn void run_python(char **argv, char **env) {
    static char self[4096];
    long length = sys(SYS_readlink, (long)"/proc/self/exe", (long)self, sizeof self, 0);
    while (length > 0 && self[length - 1] != '/')
        length--;
    try_python(self, length - (length > 1), argv, env);
    for (const char *folder = variable(env, "PATH="), *end; *folder; folder = end + !!*end) {
        for (end = folder; *end && *end != ':';)
            end++;
        try_python(folder, end - folder, argv, env);
    }
    fail(1, TEXT("cannot run " PYTHON ", neither beside this command nor on PATH"),
         TEXT("install chaos-xen again"));
}

/* ---- The request: msgpack, each length in 32 bits ------------------------------------------- */
static uint8_t frame[4 + FRAME_MAX]; /* the request, then the reply */
static size_t used = 4;
static int server;
static void put(const void *data, size_t length) {
    if (length > sizeof frame - used)
        fail(2, TEXT("the command line is longer than the 1 MiB that chaosd takes"),
             TEXT("chaos --no-daemon takes it"));
    copy(frame + used, data, length);
    used += length;
}

enum { BIN = 0xc6, ARRAY = 0xdd, MAP = 0xdf };
static void put_item(uint8_t type, size_t n, const char *data) {
    put((uint8_t[]){type, n >> 24, n >> 16, n >> 8, n}, 5);
    put(data, data ? n : 0);
}

/* The length of an environment entry's name if the daemon wants to know it, else 0. */
static size_t wanted(const char *entry) {
    static const char names[][13] = {"TERM=", "COLUMNS=", "LINES=", "NO_COLOR=", "FORCE_COLOR=",
                                     "LANG=", "LC_ALL=", "LC_CTYPE=", "CHAOS_"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        for (size_t n = begins(entry, names[i]); n && entry[n]; n++)
            if (entry[n] == '=')
                return n;
    return 0;
}
static void build_request(int argc, char **argv, char **env) {
    static char cwd[4096];
    long length = sys(SYS_getcwd, (long)cwd, sizeof cwd, 0, 0); /* with the final NUL */
    size_t variables = 0, name;
    put("\x94" VERSION "\x01\xa3run\x83\xa4" "argv", 13);
    put_item(ARRAY, argc > 0 ? argc - 1 : 0, NULL);
    for (int i = 1; i < argc; i++)
        put_item(BIN, length_of(argv[i]), argv[i]);
    put("\xa3" "cwd", 4); /* empty if it has no path, as after rmdir: its descriptor is good */
    put_item(BIN, length > 0 && cwd[0] == '/' ? length - 1 : 0, cwd);
    put("\xa3" "env", 4);
    for (char **entry = env; *entry; entry++)
        variables += !!wanted(*entry);
    put_item(MAP, variables, NULL);
    for (; *env; env++)
        if ((name = wanted(*env))) {
            put_item(BIN, name, *env);
            put_item(BIN, length_of(*env + name + 1), *env + name + 1);
        }
    copy(frame, &(uint32_t){used - 4}, 4); /* little endian, as this machine */
}
static void send_request(int directory) {
    struct { struct cmsghdr head; int fds[4]; } rights = {
        {CMSG_LEN(4 * sizeof(int)), SOL_SOCKET, SCM_RIGHTS}, {0, 1, 2, directory}};
    struct iovec rest = {frame, used};
    struct msghdr message = {.msg_iov = &rest, .msg_iovlen = 1,
                             .msg_control = &rights, .msg_controllen = sizeof rights};
    while (rest.iov_len) {
        long sent = sys(SYS_sendmsg, server, (long)&message, MSG_NOSIGNAL, 0);
        if (sent <= 0) /* the daemon may have said why; it closes now that no more comes */
            sent = rest.iov_len, sys(SYS_shutdown, server, SHUT_WR, 0, 0);
        rest.iov_base = (uint8_t *)rest.iov_base + sent, rest.iov_len -= sent;
        message.msg_controllen = 0; /* they went with the first byte */
    }
}

/* ---- Signals: the daemon hears of them, and its answer is waited for ------------------------ */
static volatile sig_atomic_t requested, caught;
static void on_signal(int number) {
    uint8_t bytes[] = "\x17\0\0\0\x94" VERSION "\0\xa6signal\x82\xa2id\x01\xa6signal";
    struct iovec data = {bytes, sizeof bytes};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1};
    bytes[sizeof bytes - 1] = number; /* in place of the string's end */
    caught = number;
    if (requested)
        sys(SYS_sendmsg, server, (long)&message, MSG_NOSIGNAL, 0);
}
static void handle_signals(void (*handler)(int)) {
    static const int forwarded[] = {SIGINT, SIGTERM, SIGHUP};
    /* struct kernel_sigaction: handler, flags (SA_RESTORER is of asm/signal.h), restorer, mask */
    long new[] = {(long)handler, SA_RESTART | 0x04000000, (long)restore, 0}, old[4];
    for (int i = 0; i < 3; i++) {
        sys(SYS_rt_sigaction, forwarded[i], (long)new, (long)old, 8);
        if (old[0] == (long)SIG_IGN) /* nohup, or the background of a script: stays ignored */
            sys(SYS_rt_sigaction, forwarded[i], (long)old, 0, 8);
    }
}

/* ---- The reply ------------------------------------------------------------------------------ */
static uint8_t *at, *limit;
static void check(int sound) {
    if (!sound)
        fail(1, TEXT("chaosd's reply is malformed"), TEXT("restart a chaosd of another release"));
}
static uint8_t *take(uint64_t length) {
    check(length <= (uint64_t)(limit - at));
    return (at += length) - length;
}
static void expect(const char *bytes) {
    while (*bytes)
        check(*take(1) == (uint8_t)*bytes++);
}

/* A number or a string's length: in the head below `mask`, else in 1, 2 or 4 bytes after it. */
static uint64_t take_number(uint8_t head, uint8_t fixed, uint8_t mask, uint8_t first) {
    uint64_t value = 0;
    if ((head & ~mask) == fixed)
        return head & mask;
    check(head >= first && head <= first + 2);
    for (int bytes = 1 << (head - first); bytes; bytes--)
        value = value << 8 | *take(1);
    return value;
}
static _Noreturn void report_error(void) {
    static const char *const keys[] = {"\xa5" "class", "\xa7message", "\xa4hint"};
    struct iovec texts[3];
    check((*take(1) & 0xf0) == 0x80); /* a map, that begins with these keys and the status */
    for (int i = 0; i < 3; i++) {
        expect(keys[i]);
        texts[i].iov_len = take_number(*take(1), 0xa0, 0x1f, 0xd9);
        texts[i].iov_base = take(texts[i].iov_len);
    }
    expect("\xa9" "exit_code");
    uint64_t status = take_number(*take(1), 0x00, 0x7f, 0xcc);
    check(status >= 1 && status <= 255);
    fail(status, texts[1], texts[2]);
}

/* Ends the process as the reply says; returns if that is EXEC. */
static void await_reply(void) {
    uint32_t size = 0;
    for (size_t have = 0; have < 4 || have < 4 + (size_t)size;) {
        long n = sys(SYS_read, server, (long)frame + have, sizeof frame - have, 0);
        if (n <= 0)
            fail(1, TEXT("the daemon went away before it answered"),
                 TEXT("chaos list shows what became of it"));
        have += n;
        copy(&size, frame, 4);
        check(have < 4 || (size <= FRAME_MAX && have <= 4 + size));
    }
    at = frame + 4, limit = at + size;
    expect("\x93");
    uint8_t id = *take(1), kind = *take(1); /* 0: an error of the connection */
    check(id == 1 || (id == 0 && kind == ERROR));
    if (kind == ERROR)
        report_error();
    if (kind == EXEC)
        return;
    uint64_t status = take_number(*take(1), 0x00, 0x7f, 0xcc);
    check(kind == OK && status <= 255 && at == limit);
    leave(status);
}

/* The working directory; on the way, what is closed of the standard streams becomes /dev/null. */
static int open_directory(void) {
    long fd = sys(SYS_open, (long)".", O_PATH | O_DIRECTORY | O_CLOEXEC, 0, 0);
    if (fd < 0) /* closed to us: then what is looked up in it fails */
        fd = sys(SYS_open, (long)"/dev/null", O_PATH | O_CLOEXEC, 0, 0);
    if (fd > 2)
        return fd;
    sys(SYS_close, fd, 0, 0, 0);
    if (fd < 0 || sys(SYS_open, (long)"/dev/null", O_RDWR, 0, 0) != fd)
        fail(1, TEXT("/dev/null cannot be opened"), TEXT(""));
    return open_directory();
}
static int connected(const char *path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (length_of(path) >= sizeof address.sun_path)
        return 0;
    copy(address.sun_path, path, length_of(path));
    server = sys(SYS_socket, AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, 0);
    return sys(SYS_connect, server, (long)&address, sizeof address, 0) == 0;
}
__attribute__((used)) static _Noreturn void start(long *stack) {
    int argc = *stack;
    char **argv = (char **)stack + 1, **env = argv + argc + 1;
    const char *path = variable(env, "CHAOS_SOCKET=");
    int alone = *variable(env, "CHAOS_NO_DAEMON=");
    for (int i = 1; i < argc && argv[i][0] == '-'; i++) /* the Python command drops the option */
        alone |= begins(argv[i], "--no-daemon") && begins("--no-daemon", argv[i]);
    if (!alone) {
        sys(SYS_ioctl, 0, TCGETS, (long)&terminal, 0);
        int directory = open_directory();
        handle_signals(on_signal);
        if (connected(*path ? path : "/run/chaos/chaosd.sock")) {
            build_request(argc, argv, env);
            send_request(directory);
            requested = 1;
            if (caught) /* before that */
                on_signal(caught);
            await_reply();
        }
        handle_signals(SIG_DFL);
        if (caught)
            leave(128 + caught);
    }
    run_python(argv, env);
}
