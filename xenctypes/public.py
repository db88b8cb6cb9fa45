"""Constants of Xen's public headers, under their own names.

Each block names its header below ``xen/include/public``. The values are ABI:
they hold for every release in ``xenctypes.releases`` unless a line says so.
"""

XC_PAGE_SHIFT = 12
XC_PAGE_SIZE = 1 << XC_PAGE_SHIFT
INVALID_MFN = (1 << 64) - 1

# xen.h: domain identifiers
DOMID_FIRST_RESERVED = 0x7FF0
DOMID_SELF = 0x7FF0
DOMID_IO = 0x7FF1
DOMID_XEN = 0x7FF2
DOMID_COW = 0x7FF3
DOMID_INVALID = 0x7FF4
DOMID_ANY = 0x7FF5  # since 4.22
DOMID_IDLE = 0x7FFF

# xen.h: virtual interrupts
VIRQ_TIMER = 0
VIRQ_DEBUG = 1
VIRQ_CONSOLE = 2
VIRQ_DOM_EXC = 3
VIRQ_CON_RING = 8
VIRQ_PCPU_STATE = 9
VIRQ_ENOMEM = 12

# xen.h: start_info.flags
SIF_PRIVILEGED = 1 << 0
SIF_INITDOMAIN = 1 << 1
SIF_MULTIBOOT_MOD = 1 << 2
SIF_MOD_START_PFN = 1 << 3
SIF_VIRT_P2M_4TOOLS = 1 << 4

# xen.h: hypercall numbers
HYPERVISOR_memory_op = 12
HYPERVISOR_xen_version = 17
HYPERVISOR_sched_op = 29
HYPERVISOR_event_channel_op = 32
HYPERVISOR_hvm_op = 34
HYPERVISOR_sysctl = 35
HYPERVISOR_domctl = 36

# sched.h: why a domain shut down
SHUTDOWN_poweroff = 0
SHUTDOWN_reboot = 1
SHUTDOWN_suspend = 2
SHUTDOWN_crash = 3
SHUTDOWN_watchdog = 4
SHUTDOWN_soft_reset = 5

# domctl.h: xen_domctl_createdomain.flags
XEN_DOMCTL_CDF_hvm = 1 << 0
XEN_DOMCTL_CDF_hap = 1 << 1
XEN_DOMCTL_CDF_s3_integrity = 1 << 2
XEN_DOMCTL_CDF_oos_off = 1 << 3
XEN_DOMCTL_CDF_xs_domain = 1 << 4
XEN_DOMCTL_CDF_iommu = 1 << 5
XEN_DOMCTL_CDF_nested_virt = 1 << 6
XEN_DOMCTL_CDF_vpmu = 1 << 7
XEN_DOMCTL_CDF_trap_unmapped_accesses = 1 << 8  # since 4.21

# domctl.h: xen_domctl_getdomaininfo.flags
XEN_DOMINF_dying = 1 << 0
XEN_DOMINF_hvm_guest = 1 << 1
XEN_DOMINF_shutdown = 1 << 2
XEN_DOMINF_paused = 1 << 3
XEN_DOMINF_blocked = 1 << 4
XEN_DOMINF_running = 1 << 5
XEN_DOMINF_debugged = 1 << 6
XEN_DOMINF_xs_domain = 1 << 7
XEN_DOMINF_hap = 1 << 8
XEN_DOMINF_shutdownmask = 255
XEN_DOMINF_shutdownshift = 16
XEN_INVALID_MAX_VCPU_ID = 0xFFFFFFFF

# domctl.h: schedulers, and vcpu affinity
XEN_SCHEDULER_CREDIT = 5
XEN_SCHEDULER_CREDIT2 = 6
XEN_SCHEDULER_ARINC653 = 7
XEN_SCHEDULER_RTDS = 8
XEN_SCHEDULER_NULL = 9
XEN_VCPUAFFINITY_HARD = 1 << 0
XEN_VCPUAFFINITY_SOFT = 1 << 1

# domctl.h: time stamp counter modes
TSC_MODE_DEFAULT = 0
TSC_MODE_ALWAYS_EMULATE = 1
TSC_MODE_NEVER_EMULATE = 2

# arch-x86/xen.h: xen_arch_domainconfig
XEN_X86_EMU_LAPIC = 1 << 0
XEN_X86_EMU_HPET = 1 << 1
XEN_X86_EMU_PM = 1 << 2
XEN_X86_EMU_RTC = 1 << 3
XEN_X86_EMU_IOAPIC = 1 << 4
XEN_X86_EMU_PIC = 1 << 5
XEN_X86_EMU_VGA = 1 << 6
XEN_X86_EMU_IOMMU = 1 << 7
XEN_X86_EMU_PIT = 1 << 8
XEN_X86_EMU_USE_PIRQ = 1 << 9
XEN_X86_EMU_VPCI = 1 << 10
XEN_X86_MSR_RELAXED = 1 << 0

# sysctl.h: xen_sysctl_physinfo.capabilities
XEN_SYSCTL_PHYSCAP_hvm = 1 << 0
XEN_SYSCTL_PHYSCAP_pv = 1 << 1
XEN_SYSCTL_PHYSCAP_directio = 1 << 2
XEN_SYSCTL_PHYSCAP_hap = 1 << 3
XEN_SYSCTL_PHYSCAP_shadow = 1 << 4
XEN_SYSCTL_PHYSCAP_iommu_hap_pt_share = 1 << 5
XEN_SYSCTL_PHYSCAP_vmtrace = 1 << 6
XEN_SYSCTL_PHYSCAP_vpmu = 1 << 7
XEN_SYSCTL_PHYSCAP_gnttab_v1 = 1 << 8
XEN_SYSCTL_PHYSCAP_gnttab_v2 = 1 << 9

# version.h
XENVER_version = 0
XENVER_extraversion = 1
XENVER_compile_info = 2
XENVER_capabilities = 3
XENVER_changeset = 4
XENVER_platform_parameters = 5
XENVER_pagesize = 7
XENVER_commandline = 9
XENVER_build_id = 10

# event_channel.h: evtchn_status.status
EVTCHNSTAT_closed = 0
EVTCHNSTAT_unbound = 1
EVTCHNSTAT_interdomain = 2
EVTCHNSTAT_pirq = 3
EVTCHNSTAT_virq = 4
EVTCHNSTAT_ipi = 5

# grant_table.h
GTF_invalid = 0
GTF_permit_access = 1
GTF_accept_transfer = 2
GTF_readonly = 1 << 2
GTF_reading = 1 << 3
GTF_writing = 1 << 4
GNTTAB_RESERVED_CONSOLE = 0
GNTTAB_RESERVED_XENSTORE = 1

# memory.h
XENMEM_resource_ioreq_server = 0
XENMEM_resource_grant_table = 1
XENMEM_resource_grant_table_id_shared = 0
XENMEM_resource_grant_table_id_status = 1
XENMAPSPACE_shared_info = 0
XENMAPSPACE_grant_table = 1

# hvm/params.h
HVM_PARAM_CALLBACK_IRQ = 0
HVM_PARAM_STORE_PFN = 1
HVM_PARAM_STORE_EVTCHN = 2
HVM_PARAM_IDENT_PT = 12
HVM_PARAM_TIMER_MODE = 10
HVMPTM_no_delay_for_missed_ticks = 1
HVM_PARAM_CONSOLE_PFN = 17
HVM_PARAM_CONSOLE_EVTCHN = 18

# arch-x86/hvm/start_info.h
XEN_HVM_START_MAGIC_VALUE = 0x336EC578
XEN_HVM_MEMMAP_TYPE_RAM = 1
XEN_HVM_MEMMAP_TYPE_RESERVED = 2
XEN_HVM_MEMMAP_TYPE_ACPI = 3

# xenctrl.h: xc_interface_open
XC_OPENFLAG_DUMMY = 1 << 0
XC_OPENFLAG_NON_REENTRANT = 1 << 1

# xenguest.h: the frames of an HVM container that libxenguest sets aside below 4 GiB
X86_HVM_NR_SPECIAL_PAGES = 8
X86_HVM_END_SPECIAL_REGION = 0xFF000

# xenguest.h: xc_dom_image.container_type
XC_DOM_PV_CONTAINER = 0
XC_DOM_HVM_CONTAINER = 1
