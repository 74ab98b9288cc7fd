"""The few system calls that no C library wraps everywhere, by number, with errors as :class:`OSError`."""

from __future__ import annotations

import ctypes
import os
from typing import Final

LIBC: Final = ctypes.CDLL(None, use_errno=True)
LIBC.syscall.restype = ctypes.c_long


def system_call(number: int, *arguments: int) -> int:
    """Make the call ``number``; arguments are integers and addresses, each one register wide.

    Raises:
        OSError: it answered with an error.
    """
    result: int = LIBC.syscall(ctypes.c_long(number), *(ctypes.c_long(each) for each in arguments))
    if result < 0:
        raise last_error()
    return result


def process_control(option: int, argument: int = 0) -> int:
    """prctl(2) with one argument.

    Raises:
        OSError: it answered with an error.
    """
    result: int = LIBC.prctl(option, *(ctypes.c_ulong(each) for each in (argument, 0, 0, 0)))
    if result < 0:
        raise last_error()
    return result


def last_error() -> OSError:
    """The error of the C library's call before this one, on this thread."""
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
