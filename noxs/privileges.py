"""Giving up what is not needed."""

import ctypes
import os
from errno import EINVAL

# linux/capability.h
CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER = 0, 1, 2, 3
CAP_KILL, CAP_SETGID, CAP_SETUID = 5, 6, 7
CAP_NET_ADMIN, CAP_IPC_LOCK, CAP_SYS_NICE, CAP_SYS_RESOURCE = 12, 14, 23, 24
CAPABILITY_VERSION_3 = 0x20080522
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 24, 38, 47  # linux/prctl.h
PR_CAP_AMBIENT_CLEAR_ALL = 4


def keep_only(*capabilities: int) -> None:
    """Give up all capabilities but some, for this thread and anything that it could execute.

    The user stays root: files and sockets of root's remain open to it by ownership,
    those of others do not. Raises OSError.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def call(function: str, *arguments: object, unless: int = 0) -> bool:
        if getattr(libc, function)(*arguments) == 0:
            return True
        error = ctypes.get_errno()
        if error != unless:
            raise OSError(error, f"{function}: {os.strerror(error)}")
        return False

    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call("prctl", PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    for other in range(64):
        # EINVAL: the kernel knows no more capabilities.
        if other not in capabilities and not call(
            "prctl", PR_CAPBSET_DROP, other, 0, 0, 0, unless=EINVAL
        ):
            break
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    kept = sum(1 << capability for capability in capabilities)
    low, high = kept & 0xFFFFFFFF, kept >> 32
    # struct __user_cap_data_struct[2]: effective, permitted, inheritable
    data = (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0)
    call("capset", ctypes.byref(header), ctypes.byref(data))
