#!/bin/sh
# Boots this machine's systemd on an overlay of its root: `tests/systemd.py` runs this as the first process of
# new namespaces. Whatever is written, mounted or started in here is gone with them.
#   boot.sh SCRATCH [DIRECTORY ...]   the DIRECTORYs are seen inside too, by every account
set -eu
scratch=$1
root=$scratch/root
shift

mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs "$scratch"
mkdir "$scratch/upper" "$scratch/work" "$root"
mount -t overlay -o "lowerdir=/,upperdir=$scratch/upper,workdir=$scratch/work" overlay "$root"

# The kernel is the machine's: its settings are shown, not lent.
mount -t proc proc "$root/proc"
mount --bind "$root/proc/sys" "$root/proc/sys"
mount -o remount,bind,ro "$root/proc/sys"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for device in null zero full random urandom tty; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
ln -s /proc/self/fd "$root/dev/fd"
ln -s pts/ptmx "$root/dev/ptmx"
for place in run tmp; do
    mount -t tmpfs tmpfs "$root/$place"
done
chmod 755 "$root/run"

for directory; do
    if [ -z "$(ls -A "$root$directory" 2>&-)" ]; then # under /tmp, or on another file system than the root
        mkdir -p "$root$directory"
        mount --bind -o ro "$directory" "$root$directory"
    fi
    above=$(dirname "$directory")
    while [ "$above" != / ]; do # an interpreter may lie in root's home
        [ -w "$root$above" ] && chmod a+x "$root$above" # else it is shared itself, and as it is outside
        above=$(dirname "$above")
    done
done

# Only the journal is started, and what a test starts; an id, or this were a first boot with all presets.
rm -rf "$root"/etc/systemd/system/*.wants "$root"/usr/lib/systemd/system/*.wants "$root"/lib/systemd/system/*.wants
rm -rf "$root"/usr/lib/systemd/system-generators "$root"/lib/systemd/system-generators "$root"/var/log/journal
mkdir "$root/etc/systemd/system/sysinit.target.wants"
ln -s /lib/systemd/system/systemd-journald.service "$root/etc/systemd/system/sysinit.target.wants/"
echo 0123456789abcdef0123456789abcdef >"$root/etc/machine-id"

cd "$root"
mkdir -p .outside
pivot_root . .outside
umount -l /.outside
exec env container=holdfast-test /lib/systemd/systemd --system --unit=multi-user.target --show-status=no
