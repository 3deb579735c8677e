#!/bin/sh
# Fails a pipeline when fewer VMs fit than are needed: ci.sh 40 64G SAMPLE...
needed=$1 ram=$2
shift 2
ksm plan "$@" --ram "$ram" --require "$needed" --json >plan.json
code=$?
case $code in
0) echo "$needed VMs fit on $ram" ;;
3) echo "fewer than $needed VMs fit on $ram, see report.html" && ksm report plan.json -o report.html --force ;;
*) echo "no plan could be made (exit code $code)" ;;
esac
exit $code
