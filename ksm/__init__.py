"""Linux Kernel Samepage Merging, exactly, on pages of your choice; and the real one of this host."""
from ksm.machine import Machine, Process
