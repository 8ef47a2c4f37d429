# Mounts a volume, as root; prints what it did. Arguments: name of the volume, device (may be a
# guess, or empty, or a folder that the volume is shown at), path, user, size in bytes (0: not known).
# Formats a device only if there is nothing at all on it.
set -u
PATH=$PATH:/usr/sbin:/sbin:/usr/bin:/bin
name=$1 device=$2 path=$3 user=$4 size=$5
label=$(printf 'gc-%.12s' "$name")

say() { echo "gridcloud: $*"; }
fail() {
    echo "gridcloud: $*" >&2
    exit 65
}
blank() { # whether nothing is on a device
    blkid -p "$1" >/dev/null 2>&1
    [ $? = 2 ] && head -c 1048576 "$1" | cmp -s -n 1048576 - /dev/zero
}
unused() { # whether a disk is not mounted, and not a part of or divided into anything
    [ "$(lsblk -nro NAME "$1" | wc -l)" = 1 ] && [ -z "$(lsblk -nro MOUNTPOINT "$1" | tr -d '\n ')" ]
}
find_device() {
    found=
    if [ -n "$device" ] && [ -b "$device" ]; then
        found=$(readlink -f "$device")
        return
    fi
    found=
    # What the cloud named may come late, or never. Then: what an earlier machine wrote on it, or
    # else the only empty disk of that size.
    [ -z "$device" ] || [ "$tries" -ge 10 ] || return 0
    found=$(blkid -L "$label" 2>/dev/null) && [ -n "$found" ] && return 0
    found= count=0
    [ "$size" != 0 ] || return 0
    for disk in $(lsblk -dnrbpo NAME,SIZE,TYPE | sed -n "s/ $size disk$//p"); do
        if unused "$disk" && blank "$disk"; then found=$disk count=$((count + 1)); fi
    done
    [ "$count" = 1 ] || found=
}
escaped() { # a path as /etc/fstab has it
    printf %s "$1" | sed 's/\\/\\134/g; s/ /\\040/g; s/	/\\011/g'
}

if mountpoint -q "$path"; then # done before, or by the cloud itself, which gives it to root
    [ -n "$device" ] || [ -n "$(ls -A "$path")" ] || chown "$user" "$path"
    say "the volume $name is mounted at $path"
    exit 0
fi
if [ -d "$device" ]; then # a container, which is shown a folder: it has a file system already
    mkdir -p "$path" || fail "the folder $path cannot be made"
    line="$device $(escaped "$path") none bind,nofail 0 0"
    grep -qF "$device " /etc/fstab 2>/dev/null || echo "$line" >>/etc/fstab
    mount --bind "$device" "$path" || fail "$device cannot be mounted at $path"
    [ -n "$(ls -A "$path")" ] || chown "$user" "$path"
    say "the volume $name is mounted at $path"
    exit 0
fi
tries=0
while find_device; [ -z "$found" ]; do
    tries=$((tries + 1))
    [ $tries -lt 60 ] || fail "the volume $name does not appear on the machine (${device:-no device told})"
    sleep 1
done
type=$(blkid -p -s TYPE -o value "$found" 2>/dev/null)
new=
if [ -z "$type" ]; then
    blank "$found" || fail "$found holds something that is no file system; it was left alone"
    say "making a file system on $found for the volume $name"
    mkfs.ext4 -q -m 0 -L "$label" "$found" || fail "no file system could be made on $found"
    type=ext4 new=yes
fi
uuid=$(blkid -p -s UUID -o value "$found")
mkdir -p "$path" || fail "the folder $path cannot be made"
line="UUID=$uuid $(escaped "$path") $type defaults,nofail 0 2"
grep -qF "UUID=$uuid " /etc/fstab 2>/dev/null || echo "$line" >>/etc/fstab
mount -t "$type" "$found" "$path" || fail "the $type on $found cannot be mounted at $path"
[ -z "$new" ] || chown "$user" "$path"
say "the volume $name is mounted at $path"
