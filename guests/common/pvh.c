/* SPDX-License-Identifier: BSD-2-Clause */
/* PVH: memory is mapped onto itself, and what the boot protocol lacks is asked by hypercall. */
#include "hypercall.h"
#include "lib.h"
#include "platform.h"

#include <xen/arch-x86/hvm/start_info.h>
#include <xen/grant_table.h>
#include <xen/hvm/hvm_op.h>
#include <xen/hvm/params.h>
#include <xen/memory.h>
#include <xen/sched.h>

#define XEN_LEAVES   0x40000000u
#define MEMMAP_RAM  1
#define MAPPED      0x100000u /* pfns below 4 GiB */

struct gate {
    uint16_t low, selector, type, middle;
    uint32_t high, reserved;
};

extern char image_end[], fault_entry[];
void platform_start_pvh(const struct hvm_start_info *info) __attribute__((noreturn));
void platform_fault(void) __attribute__((noreturn));

/* Shared frames take the place of these pages. */
static char window[1 + GRANT_FRAMES][NOXS_PAGE_SIZE] __attribute__((aligned(NOXS_PAGE_SIZE)));
static struct gate gates[32];

static void cpuid(uint32_t leaf, uint32_t out[4])
{
    __asm__ volatile("cpuid"
                     : "=a"(out[0]), "=b"(out[1]), "=c"(out[2]), "=d"(out[3])
                     : "a"(leaf), "c"(0));
}

/* Xen's leaves start at 0x40000000, or higher when it poses as another hypervisor, too. */
static void install_hypercall_page(void)
{
    uint32_t out[4];

    for (uint32_t base = XEN_LEAVES; base < XEN_LEAVES + 0x10000; base += 0x100) {
        cpuid(base, out);
        if (memcmp(&out[1], "XenVMMXenVMM", 12))
            continue;
        cpuid(base + 2, out);
        __asm__ volatile("wrmsr" : : "c"(out[1]), "a"((uint32_t)(uintptr_t)hypercall_page), "d"(0)
                         : "memory");
        return;
    }
}

void platform_fault(void)
{
    shutdown(SHUTDOWN_crash);
}

static void install_fault_handler(void)
{
    const struct {
        uint16_t limit;
        uint64_t base;
    } __attribute__((packed)) pointer = {sizeof(gates) - 1, (uintptr_t)gates};
    uint64_t entry = (uintptr_t)fault_entry;

    for (unsigned i = 0; i < 32; i++)
        gates[i] = (struct gate){(uint16_t)entry, 0x08, 0x8e00, (uint16_t)(entry >> 16),
                                 (uint32_t)(entry >> 32), 0};
    __asm__ volatile("lidt %0" : : "m"(pointer));
}

static uint64_t parameter(uint32_t index)
{
    struct xen_hvm_param param = {.domid = DOMID_SELF, .index = index};

    return hypercall2(__HYPERVISOR_hvm_op, HVMOP_get_param, (uint64_t)&param) ? 0 : param.value;
}

static int take_place(void *page, unsigned space, uint64_t index)
{
    struct xen_add_to_physmap how = {
        .domid = DOMID_SELF, .space = space, .idx = index, .gpfn = (uintptr_t)page >> 12};

    return (int)hypercall2(__HYPERVISOR_memory_op, XENMEM_add_to_physmap, (uint64_t)&how);
}

static void *map(uint32_t pfn)
{
    return pfn && pfn < MAPPED ? (void *)((uint64_t)pfn << 12) : NULL;
}

static uint32_t frame(const void *page)
{
    return (uint32_t)((uintptr_t)page >> 12);
}

static void *map_grants(uint32_t *entries)
{
    struct gnttab_query_size size = {.dom = DOMID_SELF};
    uint32_t count;

    if (hypercall3(__HYPERVISOR_grant_table_op, GNTTABOP_query_size, (uint64_t)&size, 1) ||
        size.status)
        return NULL;
    count = size.max_nr_frames < GRANT_FRAMES ? size.max_nr_frames : GRANT_FRAMES;
    for (uint32_t i = 0; i < count; i++)
        if (take_place(window[1 + i], XENMAPSPACE_grant_table, i))
            return NULL;
    *entries = count * (NOXS_PAGE_SIZE / sizeof(struct noxs_grant));
    return window[1];
}

/* Nothing is delivered: interrupts are off, and there is no callback. */
static void mask_events(void)
{
}

void platform_start_pvh(const struct hvm_start_info *info)
{
    const struct hvm_memmap_table_entry *memmap = (const void *)info->memmap_paddr;
    uint64_t end = (uintptr_t)image_end;

    install_fault_handler();
    install_hypercall_page();
    platform.kind = "PVH";
    platform.map = map;
    platform.frame = frame;
    platform.map_grants = map_grants;
    platform.mask_events = mask_events;
    if (info->cmdline_paddr)
        format(platform.cmdline, sizeof(platform.cmdline), "%s",
               (const char *)info->cmdline_paddr);
    for (uint32_t i = 0; info->version && i < info->memmap_entries; i++) {
        if (memmap[i].type != MEMMAP_RAM)
            continue;
        platform.pages += (uint32_t)(memmap[i].size >> 12);
        if (memmap[i].addr <= (uintptr_t)image_end &&
            memmap[i].addr + memmap[i].size > (uintptr_t)image_end)
            end = memmap[i].addr + memmap[i].size;
    }
    /* What the builder put behind the image has been read by now. */
    platform.heap = (uint32_t)((uintptr_t)image_end >> 12);
    platform.heap_end = end >> 12 < MAPPED ? (uint32_t)(end >> 12) : MAPPED;

    take_place(window[0], XENMAPSPACE_shared_info, 0);
    platform.shared = (struct shared_info *)window[0];
    platform.console = map((uint32_t)parameter(HVM_PARAM_CONSOLE_PFN));
    platform.console_evtchn = (uint32_t)parameter(HVM_PARAM_CONSOLE_EVTCHN);
    platform.store = map((uint32_t)parameter(HVM_PARAM_STORE_PFN));
    platform.store_evtchn = (uint32_t)parameter(HVM_PARAM_STORE_EVTCHN);
    platform_run();
}
