"""chaos: a Xen toolstack that boots a VM faster than a process forks."""

__version__ = "0.1.0"
