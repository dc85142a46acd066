#!/usr/bin/env bash
# Makes the environment of a stack with what uv.lock pins: openmmlab (.venv) or onedl (.venv-onedl).
# PYTHON names an interpreter; by default it is the first of 3.11, 3.12 and 3.10. Where nothing has
# changed there is nothing to do; what an interrupted set-up has left is made anew, from the caches.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
stop() { echo "Set-up stopped: $1" >&2 && exit 1; }

stack=${1:-}
[[ $stack =~ ^(openmmlab|onedl)$ ]] || stop "'$stack' is no stack; openmmlab and onedl are"
[ "$stack" = onedl ] && venv=.venv-onedl mmcv=onedl-mmcv || venv=.venv mmcv=mmcv
python=$venv/bin/python
# Where and with which PYTHON it was made, and of which files: for other files it is updated.
stamp=$venv/idlevit_mm-setup
PYTHON=${PYTHON:-$(sed -n 2p $stamp 2>/dev/null || true)}
files="$(cat uv.lock setup.py tools/setup.sh tools/build_mmcv.py | cksum) ${IDLEVIT_MM_OPS:-}"
seen=$(cat $stamp 2>/dev/null || true)
[ "$seen" != "$PWD"$'\n'"$PYTHON"$'\n'"$files" ] || ! $python -c pass ||
  ! compgen -G "$venv/lib/python3.*/site-packages/mmcv/_ext.*" >/dev/null || exit 0

mkdir -p build
exec 9>build/setup.lock
if ! flock -n 9; then
  echo 'Another set-up of this checkout runs: waiting for its end'
  flock 9 && exec bash "$0" "$stack" 9>&-
fi
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV
cache=${IDLEVIT_MM_CACHE:-${XDG_CACHE_HOME:-${HOME:-$PWD/build}/.cache}/idlevit_mm}
mkdir -p "$cache" && [ -w "$cache" ] ||
  stop "$cache cannot be written: name another folder, IDLEVIT_MM_CACHE=..."
for boot in $PYTHON python3 python3.11 python3.12 python3.10; do
  "$boot" -c pass 2>/dev/null && break
done

# uv reads nothing of pip's configuration: what that says of indexes is handed on.
settings=$("$boot" -m pip config list 2>/dev/null || true)
hand_on() { # variable of uv, option of pip, what separates several values
  local value
  value=$(for section in :env: install global; do
    sed -n "s/^$section\.$2='\(.*\)'\$/\1/p" <<<"$settings"
  done | sed -n "1{s/\\\\n\| /$3/g;p}")
  [ -z "$value" ] || [ -n "${!1:-}" ] || export "$1=$value"
}
hand_on UV_DEFAULT_INDEX index-url ''
hand_on UV_INDEX extra-index-url ' '
hand_on UV_FIND_LINKS find-links ,
hand_on UV_INSECURE_HOST trusted-host ' '
hand_on SSL_CERT_FILE cert ''
# Any index may have a file: the lock's hashes say which it is.
export UV_INDEX_STRATEGY=unsafe-best-match UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-180}

read_lock() {
  "$uv" export --frozen --quiet --no-header --no-annotate --no-emit-project --extra demo \
    --extra dev --group $stack --no-emit-package $mmcv -o build/$stack.txt
}
# A uv that is there serves if it can read the lock.
if ! { uv=$(command -v uv) && read_lock >/dev/null 2>&1; }; then
  own=$cache/uv-0.13.9 uv=$cache/uv-0.13.9/bin/uv
  fetch=(-m pip install --quiet --disable-pip-version-check uv==0.13.9)
  [ -x "$uv" ] || PIP_USER=0 "$boot" "${fetch[@]}" --target "$own" >build/log 2>&1 ||
    { "$boot" -m venv "$own" && "$own/bin/python" "${fetch[@]}"; } >>build/log 2>&1 ||
    stop "uv cannot be installed by $boot: check the network and 'pip config list'; where there \
is neither pip nor venv, 'apt install python3-venv' (log: build/log)"
  read_lock || stop 'uv.lock cannot be read, see above'
fi

[ ! -e $venv ] || [ -e $stamp ] || [ -e $stamp.json ] ||
  stop "$venv was not made by this set-up: move it away or remove it"
[[ $seen == "$PWD"$'\n'"$PYTHON"$'\n'?* ]] || rm -rf $venv
mkdir -p $venv
: >$stamp
make_venv() { "$uv" venv --quiet --allow-existing "${@:2}" --python "$1" $venv; }
for name in ${PYTHON:-3.11 3.12 3.10}; do
  $python -c pass 2>/dev/null || make_venv "$name" --no-python-downloads 2>/dev/null || true
done
[ -x $python ] || [ -n "$PYTHON" ] || make_venv 3.11 || true
$python -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null ||
  stop "there is no Python 3.10, 3.11 or 3.12${PYTHON:+ called $PYTHON}: 'apt install \
python3-dev', or name one with PYTHON=..."
printf '%s\n' "$PWD" "$PYTHON" >$stamp

version=$(sed -n "/^name = \"$mmcv\"/{n;s/version = \"\(.*\)\"/\1/p;q}" uv.lock)
tag=$($python -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
if ! compgen -G "$cache/wheels/$mmcv-$version-torch-*-$tag-*/*.whl" >/dev/null; then
  [ -n "$(command -v "${CXX:-c++}" g++)" ] ||
    stop "there is no C++ compiler for mmcv: 'apt install g++', or name one with CXX=..."
  [ -e "$($python -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] ||
    stop "Python has no headers to compile mmcv with: 'apt install python3-dev', or PYTHON=..."
fi
free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
[ -e "$("$uv" cache dir)/archive-v0" ] || [ "$free" -ge 7 ] ||
  stop "$free GiB are free on the disk of $PWD, 7 are needed: make room"
"$uv" pip install --python $python --no-deps -r build/$stack.txt -b build/$stack.txt ||
  stop "the packages do not come, see above: check the network, 'pip config list' and the disk \
($free GiB were free)"
"$uv" pip install --quiet --python $python --no-deps --no-build-isolation -e .
IDLEVIT_MM_CACHE=$cache $python tools/build_mmcv.py $mmcv "$version" || exit
$python -c 'import torchvision, mmcv.ops, mmdet.apis, mmseg.apis, timm, idlevit_mm' 2>build/log ||
  stop "$(tail -n 1 build/log): the packages do not fit together; 'rm -rf $venv' and set up again"
printf '%s\n' "$PWD" "$PYTHON" "$files" >$stamp
echo "$venv is set up ($SECONDS s)"
