#!/bin/sh
# Makes internal/gen/sqlite from the migrations and queries here, with the sqlc
# that tools/sqlc/go.mod pins. The output depends on nothing else; CI runs this
# and fails on a difference. OUT names another root to write to.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
(cd "$root/tools/sqlc" && CGO_ENABLED=0 go build -o "$work/sqlc" github.com/sqlc-dev/sqlc/cmd/sqlc)
mkdir -p "$work/store/sqlite" "${OUT:-$root}/internal/gen"
cp -R "$here/sqlc.yaml" "$here/migrations" "$here/queries" "$work/store/sqlite/"
(cd "$work/store/sqlite" && "$work/sqlc" generate)
rm -rf "${OUT:-$root}/internal/gen/sqlite"
cp -R "$work/internal/gen/sqlite" "${OUT:-$root}/internal/gen/sqlite"
