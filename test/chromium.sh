#!/usr/bin/env bash
# Prints the path of a Chromium for the tests: $CHROMIUM, else the one on PATH, else Debian's, which it unpacks without
# root into the folder .cache/chromium, once (0.5 GB).
set -euo pipefail

repo="$(dirname -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")")"
folder=$repo/.cache/chromium

refuse() {
  echo "Expected a Chromium, found $1: install one (on Debian: apt-get install chromium), or set CHROMIUM to its path." >&2
  exit 1
}

if [[ -n ${CHROMIUM:-} ]]; then
  [[ -x $CHROMIUM ]] || refuse "nothing to execute at CHROMIUM=$CHROMIUM"
  echo "$CHROMIUM"
  exit
fi
for name in chromium chromium-browser google-chrome; do
  if command -v -- "$name"; then exit; fi
done
if [[ -x $folder/run ]]; then
  echo "$folder/run"
  exit
fi
command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || refuse "none, and no apt-get to take one from"

echo "Unpacking Debian's Chromium into $folder" >&2
new=$folder.$$  # complete or not there: it gets its name at the end
trap 'rm -rf -- "$new"' EXIT
mkdir -p -- "$new/lists/partial" "$new/archives/partial" "$new/root"
# With lists of its own, because only root may bring the system's up to date. What is installed here is not taken again.
own=(-qq -o "Dir::State::lists=$new/lists" -o "Dir::Cache=$new" -o APT::Sandbox::User=root -o Debug::NoLocking=true)
apt-get "${own[@]}" update >&2 || refuse "none, and apt-get cannot reach its packages"
mapfile -t packages < <(
  apt-get "${own[@]}" --simulate --no-install-recommends install chromium fonts-inter fonts-dejavu-core |
    sed -n 's/^Inst \([^ ]*\) .*/\1/p'
)
((${#packages[@]})) || refuse "none, and no package of that name"
(cd -- "$new/archives" && apt-get "${own[@]}" download "${packages[@]}" >&2) || refuse "none, and no way to download one"
for package in "$new"/archives/*.deb; do dpkg-deb --extract "$package" "$new/root"; done
rm -rf -- "$new/lists" "$new/archives" "$new"/*.bin
[[ -x $new/root/usr/lib/chromium/chromium ]] || refuse "only a package that holds none"

cat >"$new/fonts.conf" <<END
<?xml version="1.0"?>
<fontconfig>
  <dir>$folder/root/usr/share/fonts</dir>
  <dir>/usr/share/fonts</dir>
  <cachedir>$folder/font-cache</cachedir>
  <alias><family>system-ui</family><prefer><family>Inter</family></prefer></alias>
  <alias><family>monospace</family><prefer><family>DejaVu Sans Mono</family></prefer></alias>
</fontconfig>
END
libraries="$(find "$new/root" -name '*.so*' -printf '%h\n' | sort -u | sed "s|^$new|$folder|" | paste -sd :)"
cat >"$new/run" <<END
#!/bin/sh
export LD_LIBRARY_PATH="$libraries" FONTCONFIG_FILE="$folder/fonts.conf"
exec "$folder/root/usr/lib/chromium/chromium" "\$@"
END
chmod +x "$new/run"
mv -T -- "$new" "$folder" 2>/dev/null || [[ -x $folder/run ]]  # another run may have been faster
echo "$folder/run"
