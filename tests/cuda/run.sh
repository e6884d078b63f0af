#!/usr/bin/env bash
# Everything that can be known of the CUDA provider only on a machine with a GPU. README.md says how it is used.
#   run.sh pack OUT [libs|program]...   on a machine with a network: pieces of at most PIECE_MIB (60) with a manifest
#   run.sh join PIECES                  on the one with the GPU: checks and unpacks what pack made
#   run.sh run [STEP]...                info golden kjv cache make speed torch; a JSON line per case, finished ones are kept
# What is unpacked and made lies in WORK (target/cuda).
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
root="$(cd "$here/../.." && pwd)"
work="${WORK:-$root/target/cuda}"

fail() {
    echo "run.sh: $*" >&2
    exit 1
}

# Puts files (names relative to a folder) into one archive, cut into pieces: NAME.000, NAME.001, ... and NAME.sha256.
cut_up() { # OUT NAME FOLDER FILE...
    local out="$1" name="$2" folder="$3"
    shift 3
    rm -f "$out/$name".*
    # On every core; xz takes two minutes for the libraries.
    tar -C "$folder" --sort=name --owner=0 --group=0 --numeric-owner --mtime=@0 -c "$@" |
        xz -T0 -6 | split -b "${PIECE_MIB:-60}M" -d -a 3 - "$out/$name."
    (cd "$out" && sha256sum "$name".[0-9]* >"$name.sha256")
    echo "$name: $(wc -l <"$out/$name.sha256") pieces, $(cat "$out/$name".[0-9]* | wc -c) bytes"
}

pack() { # OUT [libs|program]...
    [ $# -ge 1 ] || fail "pack OUT [libs|program]..."
    mkdir -p "$1"
    local out
    out="$(cd "$1" && pwd)"
    shift
    [ $# -gt 0 ] || set -- libs program
    local part
    for part in "$@"; do
        case "$part" in
        libs)
            # A folder with onnxruntime's library and its CUDA provider: `hf2onnx runtime install --provider cuda`.
            local capi="${ORT_GPU:-${XDG_CACHE_HOME:-$HOME/.cache}/hf2onnx/onnxruntime-gpu-1.31.1/onnxruntime/capi}"
            local file
            local -a files=()
            for file in "$capi"/libonnxruntime.so* "$capi"/libonnxruntime_providers_{cuda,shared}.so; do
                [ -f "$file" ] || fail "no $file: run hf2onnx runtime install --provider cuda, or set ORT_GPU"
                files+=("$(basename "$file")")
            done
            cut_up "$out" libs "$capi" "${files[@]}"
            ;;
        program)
            local program="${HF2ONNX:-$root/target/release/hf2onnx}"
            [ -x "$program" ] || fail "no $program: run cargo build --release, or set HF2ONNX"
            local stage
            stage="$(mktemp -d)"
            mkdir -p "$stage/golden"
            cp "$program" "$stage/hf2onnx"
            cp -r "$root/golden/cases" "$root/golden/kjv-llama" "$root/golden/weights.py" "$root/golden/support.toml" \
                "$stage/golden"
            cp -r "$root/benches/configs" "$stage/configs"
            cp "$root/tests/calibration.txt" "$stage"
            cut_up "$out" program "$stage" hf2onnx golden configs calibration.txt
            rm -rf "$stage"
            ;;
        *) fail "pack knows libs and program, not $part" ;;
        esac
    done
}

# Checks the pieces of every archive that is whole, and unpacks it; one that is not yet there is named.
join() { # PIECES
    [ $# -eq 1 ] || fail "join PIECES"
    mkdir -p "$work"
    local list name any=0
    for list in "$1"/*.sha256; do
        [ -f "$list" ] || fail "no manifest in $1"
        name="$(basename "$list" .sha256)"
        if ! (cd "$1" && sha256sum --quiet -c "$name.sha256"); then
            fail "$name: pieces are missing or damaged; bring them again and join again"
        fi
        rm -rf "${work:?}/$name"
        mkdir -p "$work/$name"
        # Not every machine has xz.
        cat "$1/$name".[0-9]* | python3 -c \
            'import sys, tarfile; tarfile.open(fileobj=sys.stdin.buffer, mode="r|xz").extractall(sys.argv[1])' \
            "$work/$name"
        echo "$name: joined into $work/$name"
        any=1
    done
    [ "$any" = 1 ]
}

case "${1:-}" in
pack) shift && pack "$@" ;;
join) shift && join "$@" ;;
run) shift && exec python3 "$here/run.py" --work "$work" "$@" ;;
*) fail "pack, join or run; README.md says more" ;;
esac
