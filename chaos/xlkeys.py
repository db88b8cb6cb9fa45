"""Settings of xl.cfg(5) that chaos knows of and does not act on, and what it does instead.

A setting is *refused* when a guest without it would not be the guest that was asked for: less
hardware, less isolation, another CPU or clock.  It is *ignored* with a warning when a PV or PVH
guest is the same without it.  A value that asks for nothing (0, "", an empty list, or one of
those named) is fine in either case.  The names are those that xl reads in any release from 4.17
on (tools/xl/xl_parse.c).
"""

from __future__ import annotations

# Names, why a guest cannot do without, values that ask for nothing.
_REFUSED = (
    ("pci dtdev usbctrl usbdev ioports iomem irqs", "chaos passes no host hardware through", ""),
    ("passthrough", "chaos passes no host hardware through", "disabled default"),
    ("vtpm p9 pvcalls channel vsnd vdispl vkb virtio", "chaos has no such device", ""),
    ("vfb vnc", "chaos gives guests no frame buffer", ""),
    ("bootloader", "chaos runs no boot loader, name the kernel itself", ""),
    ("firmware", "chaos loads no firmware, name the kernel itself", ""),
    ("pvshim", "chaos runs no PV guest inside PVH", ""),
    ("pool", "chaos has no CPU pools, the domain would run in another one", "Pool-0"),
    ("cap", "chaos sets no scheduler limits, the domain would not be held to it", ""),
    ("nestedhvm altp2m", "chaos gives guests no hardware virtualisation of their own", "disabled"),
    ("vnuma", "chaos gives guests no virtual NUMA", ""),
    ("llc_colors", "chaos does not colour caches", ""),
    ("cpuid", "chaos does not change what CPUID says", ""),
    ("msr_relaxed", "chaos does not change what MSRs do", ""),
    ("localtime rtc_timeoffset", "chaos gives guests UTC only", ""),
    ("e820_host", "chaos gives guests no map of host memory", ""),
    ("seclabel init_seclabel", "chaos sets no XSM labels, the domain would have another one", ""),
    ("driver_domain", "chaos creates no driver domains", ""),
    ("vmtrace_buf_kb", "chaos sets up no tracing of guests", ""),
)

# Names, why a guest is the same without.
_IGNORED = (
    ("cpus_soft", "it is a hint to the scheduler"),
    ("cpu_weight", "the scheduler's weight stays at its default"),
    ("period slice latency extratime", "it is for the RTDS and SEDF schedulers"),
    ("max_grant_version", "chaos offers the highest that the hypervisor has"),
    ("nomigrate", "chaos moves no guest unasked"),
    ("vif2", "xl ignores it too"),
    (
        """
        xenstore_feature_mask xenstore_quota xend_suspend_evtchn_compat
        """,
        "guests of chaos do not talk to xenstored",
    ),
    ("bootloader_args bootloader_restrict bootloader_user", "there is no boot loader"),
    ("pvshim_path pvshim_cmdline pvshim_extra", "there is no PV shim"),
    (
        """
        pci_msitranslate pci_power_mgmt pci_permissive pci_seize rdm rdm_mem_boundary
        gfx_passthru
        """,
        "there is no host hardware passed through",
    ),
    (
        """
        vnclisten vncdisplay vncunused vncpasswd vncviewer keymap sdl opengl display xauthority
        nographic videoram
        """,
        "there is no frame buffer",
    ),
    (
        """
        device_model device_model_version device_model_override device_model_args
        device_model_args_pv device_model_args_hvm device_model_stubdomain_override
        device_model_stubdomain_seclabel device_model_user dm_restrict stubdomain_kernel
        stubdomain_cmdline stubdomain_ramdisk stubdomain_memory
        """,
        "there is no device model",
    ),
    (
        """
        device_tree gic_version vuart tee sve nr_spis vpmu trap_unmapped_accesses arm_sci
        """,
        "it is for Arm only",
    ),
    (
        """
        hap oos shadow_memory acpi apic nx timer_mode
        """,
        "a PV guest has no use for it, and for a PVH guest chaos chooses",
    ),
    (
        """
        firmware_override bios bios_path_override pae acpi_s3 acpi_s4 acpi_laptop_slate hpet
        vpt_align altp2mhvm altp2m_count acpi_firmware smbios_firmware smbios ms_vm_genid
        mmio_hole xen_platform_pci xen_platform_pci_bar_uc viridian hvm_pirq mca_caps boot hdtype
        stdvga vga serial soundhw usb usbversion usbdevice vkb_device vendor_device spice
        spicehost spiceport spicetls_port spicedisable_ticketing spicepasswd spiceagent_mouse
        spicevdagent spice_clipboard_sharing spiceusbredirection spice_image_compression
        spice_streaming_video
        """,
        "it is for HVM only",
    ),
)

REFUSED: dict[str, tuple[str, tuple[str, ...]]] = {
    name: (reason, tuple(harmless.split()))
    for names, reason, harmless in _REFUSED
    for name in names.split()
}
IGNORED: dict[str, str] = {name: reason for names, reason in _IGNORED for name in names.split()}
