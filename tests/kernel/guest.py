"""`python -m tests.kernel.guest --nodes 2`: random programs on the kernel of a guest in QEMU, and on ours."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.kernel import boot, compare
from tests.kernel.agent import pack, unpack
from tests.kernel.comparison import Comparison, parser
from tests.kernel.host import WORKER
from tests.kernel.program import Program
from tests.kernel.real import worker

HERE = Path(__file__).parents[2]
MEBIBYTES = 500  # with more, the kernel would make huge pages on its own account


class Judge:
    """The kernel of a running guest."""

    def __init__(self, guest: boot.Guest) -> None:
        self._guest = guest
        hello = unpack(guest.receive())
        self.release: str = hello["kernel"]
        self.nodes: int = hello["nodes"]

    def run(self, program: Program) -> Generator[compare.Step, None, None]:
        """What `compare.run` does on the running kernel."""
        self._guest.send(pack({"program": program}))
        answer = unpack(self._guest.receive())
        if "error" in answer:
            raise RuntimeError(f"in the guest:\n{answer['error']}")
        steps: list[compare.Step] = [(result, state) for result, state in answer["steps"]]
        yield from steps


def initramfs(directory: Path, kernel: str) -> Path:
    """A guest's files, with the agent as its program, and zram for swap space."""
    root = directory / "root"
    root.mkdir()
    tree = boot.Tree(root)
    agent = tree.add_python("tests.kernel.agent", HERE)
    tree.add(worker(), Path("/bin/ksm-worker"))
    tree.add_modules(boot.modules(kernel, "lzo-rle", "zram"))
    archive = directory / "initramfs"
    tree.archive(archive, f"{WORKER}=/bin/ksm-worker {agent} /dev/ttyS1")
    return archive


@contextmanager
def booted(kernel: str = boot.KERNEL, nodes: int = 1, log: Path | None = None) -> Iterator[Judge]:
    """A kernel that judges."""
    with tempfile.TemporaryDirectory(prefix="ksm-guest-") as directory:
        archive = initramfs(Path(directory), kernel)
        with boot.Guest(boot.kernel_image(kernel), archive, nodes, MEBIBYTES, log) as guest:
            yield Judge(guest)


def main() -> int:
    options = parser("tests.kernel.guest", __doc__)
    options.add_argument("--kernel", default=boot.KERNEL, help="a file, or a Debian package (default: %(default)s)")
    options.add_argument("--nodes", type=int, default=1, help="NUMA nodes of the guest")
    options.add_argument("--log", type=Path, help="where the guest's console goes")
    comparison = Comparison(options.parse_args(), keep=False)
    a = comparison.arguments
    reason = boot.why_not(a.kernel)
    if reason:
        print(f"cannot run: {reason}")
        return 77
    try:
        with booted(a.kernel, a.nodes, a.log) as judge:
            print(f"{judge.release}, {judge.nodes} nodes", flush=True)
            while not comparison.finished():
                comparison.one(judge.run, judge.release, judge.nodes)
    finally:
        print(comparison)
    return comparison.verdict


if __name__ == "__main__":
    sys.exit(main())
