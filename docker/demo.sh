#!/bin/sh
# The demo: fio writes to the source and verifies what it wrote, over one connection, while the disk
# is mirrored to the target and moved there. At the end both sides are compared.
set -eu

: "${SOURCE:=nbd://source}" "${TARGET:=nbd://target}" "${LOAD_BYTES:=96M}"
say() { printf 'demo: %s\n' "$*"; }

say "load: $LOAD_BYTES, written and verified"
fio --name=load --ioengine=nbd --uri="$SOURCE" --rw=randwrite --bs=4k --size="$LOAD_BYTES" \
    --iodepth=8 --rate=16m --verify=crc32c --verify_fatal=1 --output=/dev/null \
    --aux-path=/tmp &
load=$!
say "mirror to $TARGET, and complete"
nbdmirror mirror "$TARGET" --speed 64M --wait completed
kill -0 "$load" || { say "FAILED: the load ended before the pivot"; exit 1; }
say "the load goes on over its connection"
wait "$load" || { say "FAILED: the load had an error"; exit 1; }
nbdmirror status

digest() { nbdcopy "$1" - | sha256sum | cut -d ' ' -f 1; }
served=$(digest "$SOURCE")
[ "$served" = "$(digest "$TARGET")" ] || { say "FAILED: source and target differ"; exit 1; }
say "done: what is served and the target are identical ($served)"
