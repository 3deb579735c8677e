"""Reads LeakSanitizer's reports and fails on leaks of memory that ksm's extension allocated."""

from __future__ import annotations

import re
import sys
from pathlib import Path

NEAR = 4  # frames: malloc itself, the function that called it, and inlined neighbours


def main(paths: list[str]) -> int:
    blocks = [b for path in paths for b in Path(path).read_text().split("\n\n") if "leak of" in b]
    ours = [b for b in blocks if any("ksm/_core" in frame for frame in re.findall(r"^ +#\d.*", b, re.MULTILINE)[:NEAR])]
    print(f"{len(blocks)} leaks in the process, {len(ours)} of them ksm's")
    print("\n\n".join(ours))
    return 1 if ours else 0


sys.exit(main(sys.argv[1:]))
