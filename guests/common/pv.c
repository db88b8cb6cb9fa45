/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * PV: the memory layout is that of "Start-of-day memory layout" in public/xen.h, so that
 * pseudo-physical page p is at VIRT_BASE + (p << 12) as far as the bootstrap mapping goes.
 * What lies beyond is mapped into a window of this image's own addresses.
 */
#include "hypercall.h"
#include "lib.h"
#include "platform.h"

#include <xen/grant_table.h>

#define PTE_PRESENT 0x1ul
#define PTE_PRW     0x63ul /* present, writable, accessed, dirty; Xen adds the user bit */
#define PTE_FRAME   0x000ffffffffff000ul

#define WINDOW_PAGES (1 + GRANT_FRAMES)

extern char pv_base[]; /* guest.lds: VIRT_BASE, 0 for most images */

void masking_callback(void);
void platform_start(const struct start_info *info, uint64_t stack) __attribute__((noreturn));

static char window[WINDOW_PAGES][NOXS_PAGE_SIZE] __attribute__((aligned(NOXS_PAGE_SIZE)));
static uint32_t window_used;
static const struct start_info *start_info;

static uint64_t address_of(uint32_t pfn)
{
    return (uint64_t)pv_base + ((uint64_t)pfn << 12);
}

static uint32_t mfn_to_pfn(uint64_t mfn)
{
    return (uint32_t)((const uint64_t *)MACH2PHYS_VIRT_START)[mfn];
}

static uint64_t pfn_to_mfn(uint32_t pfn)
{
    return ((const uint64_t *)start_info->mfn_list)[pfn];
}

/* The last level's entry for an address; 0 where there is no page table. */
static uint64_t page_entry(uint64_t va)
{
    const uint64_t *table = (const uint64_t *)start_info->pt_base;

    for (int shift = 39;; shift -= 9) {
        uint64_t entry = table[(va >> shift) & 511];

        if (!(entry & PTE_PRESENT) || shift == 12)
            return entry;
        table = (const uint64_t *)address_of(mfn_to_pfn((entry & PTE_FRAME) >> 12));
    }
}

static int update_mapping(const void *va, uint64_t entry)
{
    return (int)hypercall3(__HYPERVISOR_update_va_mapping, (uint64_t)va, entry, UVMF_INVLPG);
}

/* For frames that are no page of ours. */
static void *map_foreign(uint64_t mfn)
{
    void *va;

    if (window_used == WINDOW_PAGES)
        return NULL;
    va = window[window_used];
    if (update_mapping(va, mfn << 12 | PTE_PRW))
        return NULL;
    window_used++;
    return va;
}

/* For pages beyond the bootstrap mapping: the heap's last address serves them. */
static void *map_far(uint32_t pfn)
{
    do {
        if (platform.heap_end <= platform.heap)
            return NULL;
        platform.heap_end--;
    } while (have_noxs && noxs_reserved(&noxs, platform.heap_end));
    if (update_mapping((void *)address_of(platform.heap_end), pfn_to_mfn(pfn) << 12 | PTE_PRW))
        return NULL;
    return (void *)address_of(platform.heap_end);
}

static void *map(uint32_t pfn)
{
    uint64_t va = address_of(pfn);

    if (pfn >= start_info->nr_pages)
        return NULL;
    if (va && ((page_entry(va) & PTE_FRAME) >> 12) == pfn_to_mfn(pfn))
        return (void *)va;
    return map_far(pfn);
}

static uint32_t frame(const void *page)
{
    return (uint32_t)((page_entry((uint64_t)page) & PTE_FRAME) >> 12);
}

static void *map_grants(uint32_t *entries)
{
    struct gnttab_query_size size = {.dom = DOMID_SELF};
    uint64_t frames[GRANT_FRAMES];
    struct gnttab_setup_table setup = {.dom = DOMID_SELF};
    char *first = NULL;

    if (hypercall3(__HYPERVISOR_grant_table_op, GNTTABOP_query_size, (uint64_t)&size, 1) ||
        size.status)
        return NULL;
    setup.nr_frames = size.max_nr_frames < GRANT_FRAMES ? size.max_nr_frames : GRANT_FRAMES;
    set_xen_guest_handle(setup.frame_list, frames);
    if (hypercall3(__HYPERVISOR_grant_table_op, GNTTABOP_setup_table, (uint64_t)&setup, 1) ||
        setup.status)
        return NULL;
    for (uint32_t i = 0; i < setup.nr_frames; i++) {
        char *va = map_foreign(frames[i]);

        if (!va)
            return NULL;
        if (!first)
            first = va;
    }
    *entries = setup.nr_frames * (NOXS_PAGE_SIZE / sizeof(struct noxs_grant));
    return first;
}

static uint32_t page_after(uint32_t highest, uint64_t end)
{
    uint32_t page = (uint32_t)((end - address_of(0) + NOXS_PAGE_SIZE - 1) / NOXS_PAGE_SIZE);

    return page > highest ? page : highest;
}

static void *map_machine(uint64_t mfn)
{
    uint32_t pfn = mfn ? mfn_to_pfn(mfn) : 0;

    return pfn ? map(pfn) : NULL;
}

static void mask_events(void)
{
    hypercall3(__HYPERVISOR_set_callbacks, (uint64_t)masking_callback,
               (uint64_t)masking_callback, 0);
}

void platform_start(const struct start_info *info, uint64_t stack)
{
    uint32_t heap = 0;

    start_info = info;
    platform.kind = "PV";
    platform.map = map;
    platform.frame = frame;
    platform.map_grants = map_grants;
    platform.mask_events = mask_events;
    platform.pages = (uint32_t)info->nr_pages;
    memcpy(platform.cmdline, info->cmd_line, sizeof(platform.cmdline) - 1);
    update_mapping(NULL, 0);

    platform.shared = map_foreign(info->shared_info >> 12);
    platform.console = map_machine(info->console.domU.mfn);
    platform.console_evtchn = info->console.domU.evtchn;
    platform.store = map_machine(info->store_mfn);
    platform.store_evtchn = info->store_evtchn;

    /* Whatever the order of the bootstrap elements, the heap follows the last one. */
    heap = page_after(heap, (uint64_t)info + NOXS_PAGE_SIZE);
    heap = page_after(heap, (uint64_t)platform.console + NOXS_PAGE_SIZE);
    heap = page_after(heap, (uint64_t)platform.store + NOXS_PAGE_SIZE);
    heap = page_after(heap, info->mfn_list + info->nr_pages * sizeof(uint64_t));
    heap = page_after(heap, info->pt_base + info->nr_pt_frames * NOXS_PAGE_SIZE);
    heap = page_after(heap, stack);
    if (info->mod_len && !(info->flags & SIF_MOD_START_PFN))
        heap = page_after(heap, info->mod_start + info->mod_len);
    platform.heap = platform.heap_end = heap;
    while (platform.heap_end < info->nr_pages &&
           (page_entry(address_of(platform.heap_end)) & PTE_PRESENT))
        platform.heap_end++;

    platform_run();
}
