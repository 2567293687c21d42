#!/bin/sh
# A system of libvirt's own: libvirtd as root, in namespaces of mounts, networks and processes, so
# that it neither finds nor leaves anything, and whatever it has started ends with this process.
# $1: the number of the user that QEMU runs as; $2: where what is known about QEMU is kept.
set -eu

for place in /etc/libvirt /run /var/lib/libvirt /var/log/libvirt; do
    mkdir -p $place
    mount -t tmpfs none $place
done
# What it finds out about QEMU, which takes seconds, is kept.
mkdir -p /var/cache/libvirt "$2"
mount --bind "$2" /var/cache/libvirt

# The user that QEMU runs as; Debian makes it when it installs the service.
for file in passwd group; do grep -v ^libvirt-qemu: /etc/$file >/run/$file; done
echo "libvirt-qemu:x:$1:$1::/var/lib/libvirt:/bin/false" >>/run/passwd
echo "libvirt-qemu:x:$1:" >>/run/group
for file in passwd group; do mount --bind /run/$file /etc/$file; done

# Whose files are whose is the test's affair; and there is no virtlogd.
cat >/etc/libvirt/qemu.conf <<'END'
dynamic_ownership = 0
security_driver = "none"
stdio_handler = "file"
END
echo 'auth_unix_rw = "none"' >/etc/libvirt/libvirtd.conf

# As the first process of its namespace this shell gets all orphans, and `wait` reaps them.
/usr/sbin/libvirtd &
wait
