#!/usr/bin/env bash
# Compiles the page's scripts into src/serve/page/, which the program embeds beside what stands here; with --check
# only says whether what is there is what the sources make.
set -euo pipefail
cd "$(dirname "$0")"
out=../../src/serve/page

case "${1:-}" in
    "" | --check) ;;
    *) echo "usage: $0 [--check]" >&2; exit 2 ;;
esac

# The compiler, as the lockfile has it.
[ node_modules/.package-lock.json -nt package-lock.json ] || npm ci --no-audit --no-fund --silent

made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT
npx --no-install tsc --outDir "$made"
chmod 644 "$made"/*

if [ "${1:-}" = --check ]; then
    diff -r "$out" "$made" >/dev/null || {
        echo "src/serve/page is not what web/page makes: run web/page/build.sh" >&2
        exit 1
    }
else
    rm -rf "$out"
    mkdir -p "$out"
    cp "$made"/* "$out"
fi
