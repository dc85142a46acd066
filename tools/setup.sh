#!/usr/bin/env bash
# Makes the environment of a stack with what uv.lock pins: openmmlab (.venv) or onedl (.venv-onedl).
# PYTHON names an interpreter; by default it is the first of 3.11, 3.12 and 3.10. Where nothing has
# changed there is nothing to do; what an interrupted set-up has left is made anew, from the caches.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
stop() {
  echo "Set-up stopped: $1" >&2
  exit 1
}

stack=${1:-}
case $stack in
  openmmlab) venv=.venv mmcv=mmcv ;;
  onedl) venv=.venv-onedl mmcv=onedl-mmcv ;;
  *) stop "'$stack' is no stack; openmmlab and onedl are" ;;
esac
stamp=$venv/idlevit_mm-setup
# Of another base an environment is made anew, for other files it is brought up to date.
base="$PWD ${PYTHON:-}"
files="$(cat uv.lock setup.py tools/setup.sh tools/build_mmcv.py | cksum) ${IDLEVIT_MM_OPS:-}"
if [ "$(cat $stamp 2>/dev/null)" = "$base"$'\n'"$files" ] && $venv/bin/python -c pass &&
  compgen -G "$venv/lib/python3.*/site-packages/mmcv/_ext.*" >/dev/null; then
  exit
fi

mkdir -p build
exec 9>build/setup.lock
if command -v flock >/dev/null && ! flock -n 9; then
  echo 'Another set-up of this checkout runs: waiting for its end'
  flock 9
  exec bash "$0" "$stack" 9>&-
fi
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV
cache=${IDLEVIT_MM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/idlevit_mm}
mkdir -p "$cache" || stop "$cache cannot be written: name another folder, IDLEVIT_MM_CACHE=..."

# uv reads nothing of pip's configuration: what that says of indexes is handed on.
for boot in ${PYTHON:-} python3 python3.11 python3.12 python3.10; do
  "$boot" -c pass 2>/dev/null && break
done
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
  [ -x "$uv" ] || PIP_USER=0 "$boot" "${fetch[@]}" --target "$own" >build/uv.log 2>&1 ||
    { "$boot" -m venv "$own" && "$own/bin/python" "${fetch[@]}"; } >>build/uv.log 2>&1 ||
    stop "uv cannot be installed: check the network and 'pip config list'; if Python has neither \
pip nor venv, 'apt install python3-venv' (log: build/uv.log)"
  read_lock || stop 'uv.lock cannot be read, see above'
fi

# The first Python that fits and has the headers that mmcv is compiled with, or else one without.
fits='import os, sys, sysconfig; sys.exit(2 if not (3, 10) <= sys.version_info < (3, 13) else
  not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'
python=''
for name in ${PYTHON:-3.11 3.12 3.10}; do
  found=$("$uv" python find --system --no-python-downloads "$name" 2>/dev/null) || continue
  fit=0 && "$found" -c "$fits" || fit=$?
  [ $fit = 2 ] || python=${python:-$found}
  [ $fit != 0 ] || { python=$found && break; }
done
[ -n "$python" ] || [ -z "${PYTHON:-}" ] ||
  stop "PYTHON=$PYTHON is no Python 3.10, 3.11 or 3.12 that runs: name another one"
if [ -e $venv ] && [ "$(head -n 1 $stamp 2>/dev/null)" != "$base" ]; then
  [ -e $stamp ] || [ -e $stamp.json ] ||
    stop "$venv was not made by this set-up: move it away or remove it"
  rm -rf $venv
fi
mkdir -p $venv
: >$stamp
# Where none was found, uv fetches one.
"$uv" venv --quiet --allow-existing --python "${python:-3.11}" $venv || stop \
  "there is no Python 3.10, 3.11 or 3.12: 'apt install python3-dev', or name one with PYTHON=..."
python=$venv/bin/python

version=$(sed -n "/^name = \"$mmcv\"/{n;s/version = \"\(.*\)\"/\1/p;q}" uv.lock)
tag=$($python -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
if ! compgen -G "$cache/wheels/$mmcv-$version-torch-*-$tag-*/*.whl" >/dev/null; then
  [ -n "$(command -v "${CXX:-c++}" g++)" ] ||
    stop "there is no C++ compiler for mmcv: 'apt install g++', or name one with CXX=..."
  $python -c "$fits" || stop "$($python -c 'import sys; print(sys._base_executable)') has no \
Python.h for mmcv: 'apt install python3-dev', or name another Python with PYTHON=..."
fi
free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
[ -e "$("$uv" cache dir)/archive-v0" ] || [ "$free" -ge 7 ] ||
  stop "$free GiB are free on the disk of $PWD, 7 are needed: make room"
"$uv" pip install --python $python --no-deps -r build/$stack.txt ||
  stop "the packages do not come, see above: check the network, 'pip config list' and the disk \
($free GiB were free)"
"$uv" pip install --quiet --python $python --no-deps --no-build-isolation -e .
IDLEVIT_MM_CACHE=$cache $python tools/build_mmcv.py $mmcv "$version" || stop 'see the line above'
$python -c 'import torchvision, mmcv.ops, mmdet.apis, mmseg.apis, timm, idlevit_mm' ||
  stop "the packages do not work together, see above; 'rm -rf $venv' and set up again"
printf '%s\n%s\n' "$base" "$files" >$stamp
echo "$venv is set up ($SECONDS s)"
