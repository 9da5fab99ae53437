#!/bin/bash
# The main job, start to end: demo.sh PMEM BACKING on real devices (which it overwrites), demo.sh alone on plain files.
set -euo pipefail

bold=$'\e[1m' blue=$'\e[1;34m' green=$'\e[32m' dim=$'\e[2m' plain=$'\e[0m'
step() { printf '\n%s── %s%s\n' "$blue" "$1" "$plain"; }
say() { printf '%s%s%s\n' "$dim" "$1" "$plain"; }
# Shows a command, runs it, indents what it prints.
show() { printf '%s$ %s%s\n' "$bold" "$*" "$plain"; "$@" 2>&1 | sed 's/^/  /'; }
good() { printf '%s✔ %s%s\n' "$green" "$1" "$plain"; }

for tool in ublk-pcache fio mkfs.ext4 sha256sum; do
  command -v "$tool" >/dev/null || { echo "demo: $tool is missing; install fio and e2fsprogs" >&2; exit 1; }
done

tmp=$(mktemp -d "${TMPDIR:-/tmp}/ublk-pcache-demo-XXXXXX")
if [ $# = 2 ]; then
  pmem=$1 backing=$2 emulated=yes
else
  [ -e /dev/ublk-control ] || { echo "demo: no ublk driver here: modprobe ublk_drv, or run make demo without NATIVE=1" >&2; exit 1; }
  pmem=$tmp/cache.img,size=1G backing=$tmp/disk.img emulated=
  truncate -s 4G "$backing"
fi
mnt=$tmp/mnt
mkdir "$mnt"
id=
cleanup() {
  mountpoint -q "$mnt" && umount "$mnt"
  [ -z "$id" ] || ublk-pcache del --force "$id"
  rm -rf "$tmp"
}
trap cleanup EXIT

add() {
  printf '%s$ ublk-pcache add -p %s -b %s%s\n' "$bold" "$pmem" "$backing" "$plain"
  dev=$(ublk-pcache add -p "$pmem" -b "$backing")
  echo "  $dev"
  id=${dev#/dev/ublkb}
  pmem=${pmem%,size=*} # a size is only for making the file
  # fio would make a plain file of a name that is no device.
  [ -b "$dev" ] || { echo "demo: $dev is not a block device" >&2; exit 1; }
}

# One job on a device or file: requests per second. It writes over what is there.
measure() {
  fio --name=job --filename="$1" --rw="$2" --bs=4k --iodepth="$3" --ioengine=io_uring --direct=1 --size=256M \
    --runtime=5 --time_based --randseed=1 --output-format=terse --terse-version=3 |
    awk -F';' '{ printf "%d", $8 + $49 }'
}

step "Two devices"
if [ "$emulated" ]; then
  uname -sr | sed 's/^/  /'
  show lsblk -d -o NAME,SIZE,MODEL "$backing"
  printf '%s$ ndctl list -N%s\n' "$bold" "$plain"
  ndctl list -N | grep -E '"(mode|size|chardev)"' | tr -d '",' | sed 's/^ */  /'
else
  echo "  two plain files: $pmem, $backing"
fi

step "The raw disk, for comparison"
declare -A raw cached
for job in "randwrite 1" "randwrite 32" "randread 32"; do
  raw[$job]=$(measure "$backing" $job)
done
good "measured"

step "Put the pmem in front of the disk"
add
show ublk-pcache list

step "The same jobs through the cache"
for job in "randwrite 1" "randwrite 32" "randread 32"; do
  cached[$job]=$(measure "$dev" $job)
done
printf '  %-26s %10s %10s\n' "4 KiB requests per second" "raw disk" "cached"
for job in "randwrite 1" "randwrite 32" "randread 32"; do
  printf '  %-26s %10d %10d\n' "${job/ / at depth }" "${raw[$job]}" "${cached[$job]}"
done
if [ "$emulated" ]; then
  say "  In this machine processor, pmem and disk are all emulated, and the disk is a file in the host's memory: a disk"
  say "  with no latency to hide. So these figures show that both work, not what a cache is worth on real hardware."
else
  say "  Both files are on the same disk, so these figures show that both work, not what a cache is worth."
fi

step "A file system, and fio checking every block it reads back"
show mkfs.ext4 -q -F "$dev"
show mount "$dev" "$mnt"
printf '%s$ fio --rw=randrw --bsrange=4k-64k --iodepth=32 --verify=crc32c …%s\n' "$bold" "$plain"
fio --name=verified --directory="$mnt" --size=64M --rw=randrw --bsrange=4k-64k --ioengine=io_uring --iodepth=32 --direct=1 \
  --numjobs=2 --verify=crc32c --verify_fatal=1 --group_reporting | grep -E '^ +(read|write): ' | sed 's/^ */  /'
good "every checksum matched"
(cd "$mnt" && sha256sum verified*) >"$tmp/sums"
show umount "$mnt"

step "What the cache holds"
show ublk-pcache status "$id"

step "Write it all back to the disk"
show ublk-pcache flush "$id"

step "Stop the cache, start it again"
show ublk-pcache del "$id"
id=
add

step "Everything is still there"
show mount "$dev" "$mnt"
printf '%s$ sha256sum -c%s\n' "$bold" "$plain"
(cd "$mnt" && sha256sum -c "$tmp/sums") | sed 's/^/  /'
show umount "$mnt"
show e2fsck -fn "$dev"
show ublk-pcache del "$id"
id=
good "done"
