"""How many VMs fit on hosts of several sizes: python plan_vms.py SAMPLE... writes report.html for the last of them."""

import sys
from pathlib import Path

import ksm
from ksm.report import plan_page

GIB = 1 << 30

samples = sys.argv[1:]  # memory images, or "pid:4711", of VMs drawn at random
vm = ksm.VMClass("vm", samples)
hosts = [ksm.HostSpec(ram=size * GIB, name=f"{size} GiB", reserve=GIB, swap=2 * GIB) for size in (4, 8, 16)]
answer = ksm.plan(vm, hosts, ksm.Policy(broken=0.25, confidence=0.9))
for host in answer.hosts:
    fits = host.fits
    print(f"{host.host.name}: {fits.without_ksm} VMs without KSM, {fits.recommended} with it ({fits.limited_by})")
    for tunable in host.tunables:
        print(f"    {tunable.name}={tunable.value}")
Path("report.html").write_text(plan_page(answer), encoding="utf-8")
