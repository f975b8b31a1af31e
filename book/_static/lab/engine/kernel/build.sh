#!/bin/sh
# Build the kernels and write ../kernel.js, which holds their bytes as text, since a page that is opened
# from a disk may load no other kind of file. Usage: build.sh [OUTPUT]. Needs clang and wasm-ld, and writes down
# which version made the bytes.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=$(realpath "${1:-$here/../kernel.js}")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$here"
clang --target=wasm32 -std=c11 -O3 -msimd128 -mbulk-memory -fno-math-errno -ffp-contract=off \
  -fvisibility=hidden -nostdlib -Wall -Wextra -Werror -Wl,--no-entry,--strip-all,--export=__heap_base \
  -o "$folder/kernel.wasm" products.c network.c
version=$(clang --version | sed -n '1s/.*clang version \([0-9.]*\).*/clang \1/p')
{
  echo "// Made by kernel/build.sh with $version."
  echo "lab.define(\"kernel\", () => ({"
  echo "  base64:"
  base64 -w 100 "$folder/kernel.wasm" | sed 's/.*/    "&" +/'
  echo "    \"\","
  echo "}));"
} > "$out"
