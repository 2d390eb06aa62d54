#!/bin/sh
# Makes internal/gen/api and internal/gen/operator from the two OpenAPI
# documents here. The generator's version is in tools/oapi-codegen/go.mod. The
# output depends on the inputs and that version only; CI runs it and fails on a
# difference. OUT names another root to write to.
set -eu
cd "$(dirname "$0")"
out=$(cd "${OUT:-..}" && pwd)
bin=$(mktemp -d)
trap 'rm -rf "$bin"' EXIT
(cd ../tools/oapi-codegen && go build -o "$bin/" github.com/oapi-codegen/oapi-codegen/v2/cmd/oapi-codegen)
mkdir -p "$out/internal/gen/api" "$out/internal/gen/operator"
"$bin/oapi-codegen" -config api.cfg.yaml -o "$out/internal/gen/api/api.gen.go" openapi.yaml
"$bin/oapi-codegen" -config operator.cfg.yaml -o "$out/internal/gen/operator/operator.gen.go" operator.yaml
