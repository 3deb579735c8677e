"""The running kernel as the judge: programs of memory operations, run on real KSM and on `ksm.Machine`."""
