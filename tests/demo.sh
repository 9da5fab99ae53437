#!/bin/bash
# The main job, start to end: demo.sh PMEM BACKING on real devices (which it overwrites), demo.sh alone on plain files.
set -euo pipefail

bold=$'\e[1m' blue=$'\e[1;34m' green=$'\e[32m' dim=$'\e[2m' plain=$'\e[0m'
step() { printf '\n%s── %s%s\n' "$blue" "$1" "$plain"; }
say() { printf '%s  %s%s\n' "$dim" "$1" "$plain"; }
prompt() { printf '%s$ %s%s\n' "$bold" "$*" "$plain"; }
# Shows a command, runs it, indents what it prints.
show() { prompt "$@"; "$@" 2>&1 | sed 's/ *$//; s/^/  /'; }
good() { printf '%s✔ %s%s\n' "$green" "$1" "$plain"; }
refuse() { echo "demo: $1" >&2; exit 1; }

if [ $# = 2 ]; then
  pmem=$1 backing=$2 emulated=yes
else
  [ "$(id -u)" = 0 ] || refuse "a block device is root's to make: run it as root"
  [ -e /dev/ublk-control ] || refuse "no ublk driver on this machine: modprobe ublk_drv, or without NATIVE=1 the demo brings its own kernel"
  if ! { command -v fio && command -v mkfs.ext4; } >/dev/null; then
    apt-get update -qq && apt-get install -qq -y --no-install-recommends fio e2fsprogs >/dev/null
  fi
  emulated=
fi

tmp=$(mktemp -d "${TMPDIR:-/var/tmp}/ublk-pcache-demo-XXXXXX")
if [ -z "$emulated" ]; then
  pmem=$tmp/cache.img,size=1G backing=$tmp/disk.img
  truncate -s 4G "$backing"
  chmod o= "$backing"
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
  prompt ublk-pcache add -p "$pmem" -b "$backing"
  dev=$(ublk-pcache add -p "$pmem" -b "$backing")
  echo "  $dev"
  id=${dev#/dev/ublkb}
  pmem=${pmem%,size=*} # a size is only for making the file
  # fio would make a plain file of a name that is no device.
  [ -b "$dev" ] || refuse "$dev is not a block device"
}

# One job on a device or file: requests per second. It writes over what is there. Of fio's terse form, field 8 is the
# rate of reads and field 49 that of writes.
measure() {
  fio --name=job --filename="$1" --rw="$2" --bs=4k --iodepth="$3" --ioengine=io_uring --direct=1 --size=64M \
    --runtime=4 --time_based --randseed=1 --output-format=terse --terse-version=3 |
    awk -F';' '$1 == 3 { print $8 + $49; found = 1 } END { exit !found }'
}
jobs=("randwrite 1" "randwrite 32" "randread 32")

step "Two devices"
if [ "$emulated" ]; then
  show uname -sr
  prompt ndctl list -N
  ndctl list -N | grep -E '"(mode|size|chardev)"' | tr -d '",' | sed 's/^ */  /; s/:/: /'
  show lsblk -d -o NAME,SIZE,MODEL "$backing"
  say "This machine is emulated, and its disk limited to 200 requests per second, like a hard disk."
else
  say "Two plain files, one for the cache and one for the disk: $tmp"
fi

step "The disk alone"
declare -A raw cached
prompt "fio --bs=4k --direct=1 --rw=randwrite …"
for job in "${jobs[@]}"; do
  raw[$job]=$(measure "$backing" $job)
  printf '  %-22s %7d requests per second\n' "${job/ / at depth }" "${raw[$job]}"
done

step "Put the pmem in front of it"
add
show ublk-pcache list

step "The same through the cache"
for job in "${jobs[@]}"; do
  cached[$job]=$(measure "$dev" $job)
  printf '  %-22s %7d requests per second, %s times the disk alone\n' "${job/ / at depth }" "${cached[$job]}" \
    "$(awk "BEGIN { printf \"%.1f\", ${cached[$job]} / ${raw[$job]} }")"
done
if [ "$emulated" ]; then
  say "The emulated processor is the limit now. Real hardware has other figures on both sides."
else
  say "Both files are on the same disk, so this shows that it works, not what it is worth."
fi

step "A file system, and fio checking every block that it reads back"
show mkfs.ext4 -q -F "$dev"
show mount "$dev" "$mnt"
prompt "fio --rw=randrw --bsrange=4k-64k --iodepth=32 --verify=crc32c …"
fio --name=verified --directory="$mnt" --size=48M --rw=randrw --bsrange=4k-64k --ioengine=io_uring --iodepth=32 --direct=1 \
  --numjobs=2 --verify=crc32c --verify_fatal=1 --group_reporting | grep -E '^ +(read|write): ' | sed 's/^ */  /; s/;.*//'
good "every checksum matched"
(cd "$mnt" && sha256sum verified*) >"$tmp/sums"

step "Kill the server while somebody writes"
server=$(ublk-pcache list --json | awk -F'[:,]' '/"pid"/ { print $2 + 0 }')
(cd "$mnt" && dd if=/dev/urandom of=written bs=64k count=400 oflag=direct status=none && sha256sum written) >"$tmp/written" &
writer=$!
sleep 1
show kill -9 "$server"
while [ -e "/proc/$server" ]; do sleep 0.1; done
show ublk-pcache list
show ublk-pcache recover "$id"
wait "$writer" || refuse "the writer failed"
cat "$tmp/written" >>"$tmp/sums"
good "the writer waited, and finished without an error"
show umount "$mnt"

step "What the cache holds"
show ublk-pcache status "$id"

step "Write it all back, stop the cache, start it again"
show ublk-pcache flush "$id"
show ublk-pcache del "$id"
id=
add

step "Everything is still there"
show mount "$dev" "$mnt"
prompt "sha256sum -c"
(cd "$mnt" && sha256sum -c "$tmp/sums") | sed 's/^/  /'
show umount "$mnt"
show e2fsck -fn "$dev"
show ublk-pcache del "$id"
id=
good "done"
