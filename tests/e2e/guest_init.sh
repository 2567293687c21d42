#!/bin/busybox sh
# The guest's only program. It mounts its disk and does what the console tells it, a word a line:
#
#   write    write files in the background, without pause, until `pause`
#   record   write records into a database in the background, a transaction each, until `pause`
#   pause    let the writers finish the file that they are at
#   verify   forget what is cached, and compare each file with the checksum that memory has of it
#   unmount  leave the disk consistent
#   halt     power off
#
# Each answer is a line that starts with "guest: ". One with FAILED in it says that the disk did
# wrong. Words of the kernel's command line that the kernel does not know are variables here:
#
#   disk=vda       the disk, or
#   nbd=HOST,PORT  connect the kernel's own NBD client to the default export there
#   options=...    for mount
#   journal=...    of the database: delete or wal

/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
stty -echo

WRITERS="a b"
FILES_PER_WRITER=16

say() { echo "guest: $*"; }

main() {
    say up
    [ "$mode" != trial ] || poweroff -f
    load virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_blk
    [ -z "$nbd" ] || connect_nbd "${nbd%,*}" "${nbd#*,}"
    mount -t ext4 -o "${options:-defaults}" "/dev/$disk" /mnt || say "FAILED to mount $disk"
    mkdir -p /mnt/files /tmp/sums
    sync
    say mounted
    while read -r word; do
        case $word in
            write) write ;;
            record) record ;;
            pause) pause && say paused ;;
            verify) verify ;;
            unmount) pause && umount /mnt && say unmounted ;;
            halt) poweroff -f ;;
            *) say "FAILED to understand $word" ;;
        esac
    done
}

# What is not there is built in.
load() {
    for module; do
        [ ! -e "/modules/$module.ko" ] || insmod "/modules/$module.ko" ||
            say "FAILED to load $module"
    done
}

connect_nbd() {
    load failover net_failover virtio_net nbd
    ip address add 10.0.2.15/24 dev eth0
    ip link set eth0 up
    # From 3.26 on its sectors are 4 KiB otherwise, larger than the blocks of this file system.
    nbd-client -b 512 "$1" "$2" /dev/nbd0 || say "FAILED to connect"
    # Newer ones have the kernel connect while they return.
    tries=0
    until [ "$(cat /sys/block/nbd0/size)" -gt 0 ] &&
        [ "$(cat /sys/block/nbd0/queue/logical_block_size)" -eq 512 ]; do
        tries=$((tries + 1))
        [ $tries -lt 300 ] || { say "FAILED to connect in time"; break; }
        sleep 0.1
    done
    disk=nbd0
}

write() {
    rm -f /tmp/pause
    pids=
    for writer in $WRITERS; do
        write_files "$writer" &
        pids="$pids $!"
    done
}

pause() {
    : >/tmp/pause
    wait $pids
    pids=
}

# Files of a fixed length each, over and over: some are written over in place, some are removed
# first, so that their blocks are discarded. Each begins with a line that has its name, its number
# and the checksum of the rest, so that whoever reads it later knows what it is. What is to be on
# the disk is known from memory.
write_files() {
    n=$(cat "/tmp/at$1" 2>/dev/null || echo 0)
    while [ ! -e /tmp/pause ]; do
        slot=$((n % FILES_PER_WRITER))
        file=$1$slot
        head -c $((1 + slot * 9973)) /dev/urandom >"/tmp/data$1"
        sum=$(md5sum <"/tmp/data$1")
        line=$(printf '%s %06d %s' "$file" "$n" "${sum%% *}")
        { echo "$line"; cat "/tmp/data$1"; } >"/tmp/new$1"
        [ $((n / FILES_PER_WRITER % 3)) -ne 2 ] || rm -f "/mnt/files/$file"
        dd if="/tmp/new$1" of="/mnt/files/$file" bs=64k conv=notrunc,fsync 2>"/tmp/dd$1" ||
            say "FAILED to write $file: $(cat "/tmp/dd$1")"
        md5sum <"/tmp/new$1" >"/tmp/sums/$file"
        say "wrote $line"
        n=$((n + 1))
        [ $((n % 10)) -ne 0 ] || fstrim /mnt || say "FAILED to trim"
    done
    echo "$n" >"/tmp/at$1"
}

# A record's content is made of its number. Each transaction is on the disk when it is told of.
record() {
    rm -f /tmp/pause
    mkdir -p /mnt/records
    { records | sqlite3 -batch -bail /mnt/records/db || say "FAILED to record"; } &
    pids=$!
}

records() {
    echo "PRAGMA journal_mode = $journal; PRAGMA synchronous = extra;"
    echo "CREATE TABLE records (number INTEGER PRIMARY KEY, content TEXT);"
    echo "CREATE TABLE last (number INTEGER); INSERT INTO last VALUES (0);"
    n=0
    while [ ! -e /tmp/pause ]; do
        n=$((n + 1))
        echo "BEGIN; UPDATE last SET number = $n;"
        echo "INSERT INTO records VALUES ($n, replace(hex(zeroblob(99)), '00', '$n '));"
        echo "COMMIT; SELECT 'guest: recorded $n';"
    done
}

verify() {
    sync
    echo 3 >/proc/sys/vm/drop_caches
    count=0
    for path in /tmp/sums/*; do
        file=${path##*/}
        [ "$(md5sum <"/mnt/files/$file")" = "$(cat "$path")" ] || { say "FAILED: $file differs"; return; }
        count=$((count + 1))
    done
    say "verified $count files"
}

main
