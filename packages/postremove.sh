#!/bin/sh
# The files are gone. The descriptions of caches in /etc/ublk-pcache are their owner's, and stay.
set -e

case "$1" in
remove | purge | 0) ;;
*) exit 0 ;;
esac

# What `systemctl enable` has made leads nowhere now, unless the unit was installed in another way since.
if [ "$1" != remove ] && ! [ -e /usr/lib/systemd/system/ublk-pcache@.service ] && ! [ -e /etc/systemd/system/ublk-pcache@.service ]; then
	rm -f /etc/systemd/system/*.wants/ublk-pcache@*.service /etc/systemd/system/*.wants/ublk-pcache-exporter.service
fi
if [ -d /run/systemd/system ]; then
	systemctl daemon-reload || true
fi
if [ -S /run/udev/control ]; then
	udevadm control --reload || true
fi
