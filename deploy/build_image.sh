#!/bin/sh
# Build the container image with buildah, as root and without a container engine:
#
#     sh deploy/build_image.sh KIND TAG [BASE] [BUILDAH OPTION...]
#
# KIND is that of the Dockerfile. BASE is an image, by default one that mmdebstrap makes of Debian bookworm.
# The options come before every command of buildah, such as --root for another storage.
# What this machine says of apt mirrors, pip and certificates is mounted while the image is built, and is not in it.
set -eu
kind=$1 tag=$2 base=${3:-}
shift 2
[ $# -eq 0 ] || shift
python=${MIM_PYTHON:-python3}
checkout=$(cd "$(dirname "$0")/.." && pwd)
for tool in buildah mmdebstrap; do
    command -v "$tool" >/dev/null || { echo "$tool is missing: apt-get install buildah mmdebstrap" >&2; exit 6; }
done
[ "$(id -u)" -eq 0 ] || { echo "only root can build the image" >&2; exit 6; }
work=$(mktemp -d)
chmod 711 "$work"
child=
remove() { rm -rf --one-file-system "$work"; }
trap '[ -z "$child" ] || kill -9 "$child" 2>/dev/null; wait; remove 2>/dev/null || { sleep 1; remove; }' EXIT
trap 'exit 143' INT TERM HUP
buildah() { command buildah --storage-driver vfs "$@"; }
began=$(date +%s)

if [ -z "$base" ]; then
    base=localhost/mim-base
    if ! buildah "$@" inspect --type image "$base" >/dev/null 2>&1; then
        # the mirrors of a host that is Debian bookworm itself
        sources=$(grep -ls 'bookworm' /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list | head -1) || true
        # namespaces of its own: what it mounts, /dev/shm of this machine included, is gone when it ends in any way
        unshare --mount --propagation private --pid --fork --kill-child --mount-proc \
            env TMPDIR="$work" mmdebstrap --quiet --variant=minbase \
            --include=ca-certificates,python3,python3-venv bookworm "$work/base.tar" ${sources:+"$sources"} &
        child=$!
        wait "$child"
        child=
        container=$(buildah "$@" from scratch)
        buildah "$@" add --quiet "$container" "$work/base.tar" / >/dev/null
        buildah "$@" commit --quiet --rm "$container" "$base" >/dev/null
        rm "$work/base.tar"
    fi
fi

# pip's settings, from the environment and its files, as one file: of an option set twice the first counts
install -m 600 /dev/null "$work/pip.conf"
pip_says=$("$python" -m pip config list)
{
    echo "[global]"
    for level in :env: site user global; do
        echo "$pip_says" | sed -n "s/^$level\.\(.*\)='\(.*\)'$/\1 = \2/p"
    done | awk '!seen[$1]++'
} >>"$work/pip.conf"
mounts="--volume $work/pip.conf:/etc/pip.conf:ro"
for path in $(sed -n 's/^\(cert\|find-links\) = \(\/.*\)$/\2/p' "$work/pip.conf"); do
    [ ! -e "$path" ] || mounts="$mounts --volume $path:$path:ro"
done
# shellcheck disable=SC2086
buildah "$@" bud --quiet --isolation chroot --pull-never --build-arg BASE="$base" --build-arg KIND="$kind" $mounts \
    --file "$checkout/Dockerfile" --tag "$tag" "$checkout" >/dev/null
echo "$tag: $(buildah "$@" images --format '{{.Size}}' "$tag") in $(($(date +%s) - began)) s"
