#!/usr/bin/env bash
# Becomes a container's command where the container's files are, as Kubernetes would run it: in a mount namespace of its
# own, with a root that is read-only but for the volumes, and without root's rights. Python, Triton and all else that
# an image would bring are this machine's.
#   unshare --mount pod.sh IMAGE NEW_ROOT USER VOLUME... -- NAME=VALUE... COMMAND...
# IMAGE: a folder laid out like the image. NEW_ROOT: an empty folder. USER: a number; empty: stay who one is.
# VOLUME: TARGET=SOURCE (a folder, or a file in place of another, read-only), TARGET=rw:SOURCE, or TARGET=memory:BYTES.
set -euo pipefail

image=$1 root=$2 user=$3
shift 3

mount --make-rprivate /
mount -t tmpfs tmpfs "$root"
mkdir -- "$root/opt"
bind() { # SOURCE TARGET [OPTION]
  if [[ ! -e $root$2 ]]; then mkdir -p -- "$root$2"; fi
  mount --rbind -- "$1" "$root$2"
  # A user namespace may not drop a mount's other restrictions, which this would. There, others own the files anyway.
  if [[ ${3:-ro} == ro ]]; then mount -o remount,bind,ro "$root$2" || [[ -z $user ]]; fi
}

for path in /* /opt/*; do
  case $path in
    /tmp | /opt | /mnt | /models | /tls) ;;
    /dev | /proc | /sys) bind "$path" "$path" rw ;;
    *)
      if [[ -L $path ]]; then
        cp --no-dereference -- "$path" "$root$path"
      elif [[ -d $path && ! -e $image$path ]]; then
        bind "$path" "$path"
      fi
      ;;
  esac
done
for path in "$image"/* "$image"/opt/*; do
  if [[ $path != */opt ]]; then bind "$path" "${path#"$image"}"; fi
done
while [[ $1 != -- ]]; do
  target=${1%%=*} source=${1#*=}
  case $source in
    memory:*)
      mkdir -p -- "$root$target"
      mount -t tmpfs -o "size=${source#memory:},mode=1777" tmpfs "$root$target"
      ;;
    rw:*) bind "${source#rw:}" "$target" rw ;;
    *) bind "$source" "$target" ;;
  esac
  shift
done
shift
mount -o remount,bind,ro "$root"

# An image's files can be read by everyone. This machine's need not be, so reading alone stays allowed.
as_user=()
if [[ -n $user ]]; then
  # shellcheck disable=SC2054  # the commas are setpriv's
  as_user=(setpriv --reuid="$user" --regid="$user" --clear-groups --no-new-privs --bounding-set=-all,+dac_read_search
    --inh-caps=-all,+dac_read_search --ambient-caps=-all,+dac_read_search)
fi
exec chroot "$root" ${as_user[@]+"${as_user[@]}"} env --ignore-environment --chdir=/ "$@"
