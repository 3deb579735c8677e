"""The extension module, and the one place that switches its checks.

KSM_DEBUG=1     bounds, overflow and division checks, assertions, no optimisation
KSM_SANITIZE=1  the same, with AddressSanitizer and UndefinedBehaviorSanitizer (see .ci/sanitize)
"""

import os

from Cython.Build import cythonize
from setuptools import Extension, setup

SANITIZE = os.environ.get("KSM_SANITIZE", "0") not in ("", "0")
DEBUG = SANITIZE or os.environ.get("KSM_DEBUG", "0") not in ("", "0")

directives = {
    "language_level": 3,
    "freethreading_compatible": True,
    "boundscheck": DEBUG,
    "wraparound": False,
    "overflowcheck": False,  # hashes wrap around on purpose; UBSan looks at the signed ones
    "cdivision": not DEBUG,
    "initializedcheck": DEBUG,
}
compile_args = ["-O1", "-g", "-UNDEBUG"] if DEBUG else ["-O3"]
compile_args.append("-ffp-contract=off")  # or else simulated time would differ between processors
link_args = []
if SANITIZE:
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    compile_args += sanitizers
    link_args += sanitizers

setup(
    ext_modules=cythonize(
        [Extension("ksm._core", ["ksm/_core.pyx"], extra_compile_args=compile_args, extra_link_args=link_args)],
        compiler_directives=directives,
        force=bool(DEBUG),  # another build's C file is not this one's
    )
)
