#!/bin/sh
# Builds the small Linux guest: build.sh SOURCE.tar.xz FOLDER -> FOLDER/vmlinux, FOLDER/initramfs.cpio
set -eu
source=$1
out=$2
recipe=$(cd "$(dirname "$0")" && pwd)

cd "$out"
echo "unpacking $source" >&2
tar xf "$source"
cd linux-source-6.1
patch -s -p1 < "$recipe/linux-6.1-software-kvm.patch"
cp "$recipe/linux-6.1-tiny.config" .config
make -s olddefconfig
echo "compiling the kernel" >&2
make -s -j"$(nproc)" vmlinux
strip -o "$out/vmlinux" vmlinux
cd "$out"
rm -rf linux-source-6.1

mkdir -p root/bin root/dev root/proc root/tmp
gcc -static -O2 -Wall -Wextra -Werror -o root/init "$recipe/init.c"
strip root/init
cp /bin/busybox root/bin/busybox
for applet in sh cat ls echo ip ping dd sync sleep date head wc free ps kill mount poweroff reboot hexdump; do
  ln -s busybox "root/bin/$applet"
done
mknod root/dev/console c 5 1 2>/dev/null || true
(cd root && find . | cpio --quiet -o -H newc) > initramfs.cpio
rm -rf root
