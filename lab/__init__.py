"""The lab: a real Xen host inside QEMU, built from Debian packages."""
