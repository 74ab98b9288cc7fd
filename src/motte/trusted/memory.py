"""What this process holds, from the kernel's own books. A hardened worker hides from outside, so it reports itself."""

from __future__ import annotations

from pathlib import Path


def process_memory(status: Path = Path("/proc/self/status")) -> dict[str, int]:
    """``rss_bytes`` now and ``rss_peak_bytes`` since the start."""
    found = {}
    for line in status.read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in ("VmRSS", "VmHWM"):
            found["rss_bytes" if name == "VmRSS" else "rss_peak_bytes"] = int(rest.split()[0]) * 1024
    return found
