"""The ground floor: ctypes bindings to Xen's user-space libraries, and nothing else."""
