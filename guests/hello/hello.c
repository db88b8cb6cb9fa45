/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Says hello, says ready, sleeps until it is asked to stop. Words on its command line make it
 * do what the tests need:
 *
 *   show=page show=metadata   print what the device page says, at boot and when it changes
 *   lines=N                   print N numbered lines, waiting for a reader
 *   flood                     print for ever, waiting for a reader
 *   echo                      send console input back
 *   poweroff reboot crash fault   leave so, right after ready
 *   exit=N message=TEXT       what to say when leaving
 *   silent                    never say ready
 *   refuse                    refuse shutdown and reboot requests
 */
#include "../common/hypercall.h"
#include "../common/lib.h"
#include "../common/platform.h"

#include <xen/sched.h>
#include <xen/version.h>

static void show_address(const char *what, const uint8_t *bytes, unsigned count, unsigned prefix)
{
    print(" %s=", what);
    for (unsigned i = 0; i < count; i += count == 4 ? 1 : 2)
        if (count == 4)
            print(i ? ".%u" : "%u", bytes[i]);
        else
            print(i ? ":%x" : "%x", bytes[i] << 8 | bytes[i + 1]);
    if (prefix)
        print("/%u", prefix);
}

static int any(const uint8_t *bytes, unsigned count)
{
    while (count--)
        if (bytes[count])
            return 1;
    return 0;
}

static void show_page(void)
{
    const struct noxs_header *header = &noxs.header;
    struct noxs_vif vif;
    struct noxs_vbd vbd;

    print("page: name=%s domid=%u uuid=", header->name, header->domid);
    for (unsigned i = 0; i < sizeof(header->uuid); i++)
        print(i == 4 || i == 6 || i == 8 || i == 10 ? "-%02x" : "%02x", header->uuid[i]);
    print(" abi=%u.%u pages=%u devices=%u generation=%u first_gref=%u metadata=%u memory=%u\n",
          header->abi_major, header->abi_minor, header->pages, header->device_count,
          header->generation, header->first_free_gref, header->metadata_length, platform.pages);
    for (unsigned i = 0; noxs_vif(&noxs, i, &vif) == 0; i++) {
        print("vif: handle=%u backend=%u queues=%u features=%x mtu=%u posted=%u mac=",
              vif.dev.handle, vif.dev.backend, vif.dev.queues, vif.dev.features, vif.mtu,
              vif.queue.posted_count);
        for (unsigned b = 0; b < 6; b++)
            print(b ? ":%02x" : "%02x", vif.mac[b]);
        if (any(vif.ipv4, 4))
            show_address("ipv4", vif.ipv4, 4, vif.ipv4_prefix);
        if (any(vif.ipv4_gateway, 4))
            show_address("gateway", vif.ipv4_gateway, 4, 0);
        if (any(vif.ipv6, 16))
            show_address("ipv6", vif.ipv6, 16, vif.ipv6_prefix);
        if (any(vif.ipv6_gateway, 16))
            show_address("gateway6", vif.ipv6_gateway, 16, 0);
        print("\n");
    }
    for (unsigned i = 0; noxs_vbd(&noxs, i, &vbd) == 0; i++)
        print("vbd: handle=%u backend=%u queues=%u features=%x sectors=%lu sector_size=%u "
              "info=%x\n",
              vbd.dev.handle, vbd.dev.backend, vbd.dev.queues, vbd.dev.features, vbd.sectors,
              vbd.sector_size, vbd.info);
}

static void show_metadata(void)
{
    char part[128];
    uint32_t offset = 0;
    int length;

    if (noxs_metadata_check(&noxs)) {
        print("metadata: damaged\n");
        return;
    }
    print("metadata: ");
    while ((length = noxs_metadata(&noxs, offset, part, sizeof(part))) > 0) {
        console_write(part, (size_t)length);
        offset += (uint32_t)length;
    }
    print("\n");
}

static void show_what(const char *what)
{
    if (have_noxs && what[0] == 'p')
        show_page();
    if (have_noxs && what[0] == 'm')
        show_metadata();
}

static void leave_if_asked(void)
{
    static const struct {
        const char *word;
        unsigned reason;
    } ways[] = {
        {"poweroff", SHUTDOWN_poweroff},
        {"reboot", SHUTDOWN_reboot},
        {"crash", SHUTDOWN_crash},
        {"fault", SHUTDOWN_BY_FAULT},
    };
    char message[NOXS_MAX_MESSAGE + 1];

    option_text("message", message, sizeof(message));
    for (unsigned i = 0; i < sizeof(ways) / sizeof(ways[0]); i++)
        if (option(ways[i].word))
            guest_exit(ways[i].reason, (int)option_number("exit", 0), message);
}

void guest_main(void)
{
    long version = hypercall2(__HYPERVISOR_xen_version, XENVER_version, 0);
    const uint32_t ports[] = {platform.store_evtchn, platform.console_evtchn};
    unsigned shown = 0;
    char show[16];

    print("Hello, world! This is %s, a %s guest on Xen %lu.%lu, with %s.\n",
          have_noxs ? noxs.header.name : "a guest", platform.kind, version >> 16,
          version & 0xffff, have_noxs ? "a device page" : "no device page");
    option_text("show", show, sizeof(show));
    console_patient = 1;
    show_what(show);
    if (!option("silent"))
        guest_ready();
    leave_if_asked();
    for (long i = 1; i <= option_number("lines", 0); i++)
        print("line %ld\n", i);
    for (unsigned long i = 1; option("flood"); i++)
        print("flood %lu ................................................................\n", i);
    for (;;) {
        char typed[64];
        size_t count;

        evtchn_take(platform.console_evtchn);
        guest_control();
        if (shown != page_changes) {
            shown = page_changes;
            show_what(show);
        }
        while ((count = console_read(typed, sizeof(typed))) > 0)
            if (option("echo"))
                console_write(typed, count);
        evtchn_wait(ports, platform.console_evtchn ? 2 : 1, 0);
    }
}

NOXS_ELF_NOTE();
