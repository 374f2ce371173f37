#!/usr/bin/env bash
# `mtad serve` as the clients of others see it: OpenAI's for Python and JavaScript, schemathesis by the document of
# the interface, and the page in a browser.
#
#     tests/clients/run.sh [MTAD]
#
# MTAD is the program, target/release/mtad by default. Needs Python 3.11, Node.js 20 and Debian's chromium; what else
# the clients need is installed under target/, in the versions that are written down here. All servers listen on this
# machine alone, on ports that are free, and end with the script.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
mtad=${1:-$root/target/release/mtad}
[ -x "$mtad" ] || { echo "$mtad is no program; name one: $0 MTAD" >&2; exit 2; }
chromium=${CHROMIUM:-$(command -v chromium || true)}
[ -n "$chromium" ] || { echo "there is no chromium; install Debian's, or name one by CHROMIUM" >&2; exit 2; }
work=$(mktemp -d)
venv=$root/target/clients

servers=()
finish() {
    for pid in "${servers[@]}"; do kill "$pid" 2>/dev/null; done
    wait "${servers[@]}" 2>/dev/null
    rm -rf "$work"
}
trap finish EXIT
trap 'exit 130' INT TERM

# A server with these options; `url` is where it listens.
start() {
    local log=$work/$1.log
    shift
    "$mtad" serve --port 0 --device cpu "$@" 2>"$log" &
    servers+=($!)
    for _ in $(seq 600); do
        url=$(sed -n 's/^listening on //p' "$log")
        [ -n "$url" ] && return
        kill -0 "${servers[-1]}" 2>/dev/null || break
        sleep 0.1
    done
    cat "$log" >&2
    echo "a server did not start" >&2
    exit 1
}

failed=()
step() {
    local name=$1 begun=$SECONDS
    shift
    printf '\n== %s\n' "$name"
    "$@" || failed+=("$name")
    printf '== %s: %d s\n' "$name" $((SECONDS - begun))
}

install() {
    if ! cmp -s "$here/requirements.txt" "$venv/installed.txt"; then
        python3 -m venv --clear "$venv" && "$venv/bin/pip" -q --disable-pip-version-check install -r "$here/requirements.txt" &&
            cp "$here/requirements.txt" "$venv/installed.txt"
    fi &&
        for dir in "$here" "$root/tests/web"; do
            (cd "$dir" && { [ package-lock.json -ot node_modules/.package-lock.json ] || npm ci --silent --no-audit --no-fund; }) || return
        done
}
install || { echo "the clients could not be installed" >&2; exit 1; }

export MTAD_URL MTAD_KEYED_URL MTAD_NARROW_URL MTAD_KEY=a-key-of-the-tests CHROMIUM=$chromium
start plain && MTAD_URL=$url
start keyed --api-key "$MTAD_KEY" && MTAD_KEYED_URL=$url
start narrow --parallel 1 --queue 0 && MTAD_NARROW_URL=$url
# What is made up by the document may ask for the longest text there is, many times over: here none is long.
start fuzzed --ctx-size 48 --parallel 2 --queue 4 --body-limit 1M && fuzzed=$url

export NO_PROXY=127.0.0.1 no_proxy=127.0.0.1 PYTHONDONTWRITEBYTECODE=1
step "OpenAI's client for Python" timeout 300 "$venv/bin/pytest" -q -p no:cacheprovider -rs "$here/openai_test.py"
step "OpenAI's client for JavaScript" timeout 200 node --test "$here/openai_test.mjs"
step "the document" env -C "$work" timeout 300 "$venv/bin/schemathesis" --config-file "$here/schemathesis.toml" run "$fuzzed/openapi.json" --url "$fuzzed"
step "the page" timeout 400 node --test "$root/tests/web/"*.test.mjs

# All servers are still there, have nothing that runs, and made no mistake.
still() {
    local server url
    for server in plain keyed narrow fuzzed; do
        url=$(sed -n 's/^listening on //p' "$work/$server.log")
        curl -fsS -m 10 -H "Authorization: Bearer $MTAD_KEY" "$url/metrics" >"$work/metrics" &&
            ! grep -E '^mtad_(running|waiting) [^0]|status="5' "$work/metrics" &&
            ! grep -E 'panicked|ERROR' "$work/$server.log" || { echo "the server $server" >&2; return 1; }
    done
}
step "the servers after all of that" still

if [ ${#failed[@]} -gt 0 ]; then
    printf '\nfailed: %s\n' "$(IFS=,; echo "${failed[*]}")" >&2
    exit 1
fi
