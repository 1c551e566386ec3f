#!/bin/sh
# The tests of the page drive the system's chromium; on Debian and Ubuntu it is installed here where it is missing.
set -eu
for name in chromium chromium-browser google-chrome; do
    command -v "$name" >/dev/null 2>&1 && exit 0
done
if command -v apt-get >/dev/null 2>&1; then
    run=""
    [ "$(id -u)" = 0 ] || run="sudo -n"
    echo "installing chromium for the tests of the page"
    $run apt-get update -qq && $run apt-get install -y -qq chromium >/dev/null && exit 0
fi
echo "no chromium: install it, or leave its tests out with  make test ARGS='-m \"not browser and not gpu and not network\"'"
exit 1
