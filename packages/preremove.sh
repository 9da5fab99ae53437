#!/bin/sh
# The files are about to go. A device outlives its server, but not the program that brings its server back.
set -e

case "$1" in
remove | 0) ;;
*) exit 0 ;; # another version follows
esac

if command -v ublk-pcache >/dev/null; then
	devices=$(ublk-pcache list -o device,name,pmem) || {
		echo "ublk-pcache is not removed: it cannot be told which devices there are, see above" >&2
		exit 1
	}
	devices=$(echo "$devices" | tail -n +2)
	if [ -n "$devices" ]; then
		{
			echo "ublk-pcache is not removed: nothing could bring back the servers of"
			echo "$devices"
			echo "First run 'ublk-pcache del --all', or 'ublk-pcache del --flush --all', which leaves nothing dirty behind."
		} >&2
		exit 1
	fi
fi
if [ -d /run/systemd/system ]; then
	# Services that wait for their disk have no device yet.
	systemctl kill --signal=TERM 'ublk-pcache@*.service' || true
	systemctl stop ublk-pcache-exporter.service || true
fi
