#!/bin/sh
# The files are there. A server that runs is replaced by the one that was installed now; requests wait for a moment. Nothing
# that fails here undoes the installation: dpkg would refuse all other work until it is mended.
set -e

case "$1" in
abort-*) exit 0 ;;
esac

if [ -d /run/systemd/system ]; then
	systemctl daemon-reload || true
fi
if [ -S /run/udev/control ]; then
	udevadm control --reload || true
fi
ublk-pcache upgrade --all ||
	echo "ublk-pcache: a server was not replaced, and goes on as it was: see above, then run 'ublk-pcache upgrade --all' again" >&2
if [ -d /run/systemd/system ]; then
	systemctl try-restart ublk-pcache-exporter.service || true
fi
