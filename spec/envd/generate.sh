#!/bin/sh
# Makes internal/gen/envd from the .proto files here. Needs protoc 3.21 or
# newer and network access to the Go module proxy for the two plugins. The
# output depends on the inputs and the versions below only; CI runs it and
# fails on a difference. OUT names another root to write to.
set -eu
cd "$(dirname "$0")"
out=${OUT:-../..}
bin=$(mktemp -d)
trap 'rm -rf "$bin"' EXIT
GOBIN=$bin go install google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.12
GOBIN=$bin go install connectrpc.com/connect/cmd/protoc-gen-connect-go@v1.21.1
for p in process filesystem; do
	mkdir -p "$out/internal/gen/envd/$p"
	PATH=$bin:$PATH protoc -I . \
		--go_out="$out" --go_opt=module=github.com/cayhq/cay \
		--connect-go_out="$out" --connect-go_opt=module=github.com/cayhq/cay \
		"$p/$p.proto"
	# The header of protoc-gen-go names the installed protoc, which differs
	# between machines and changes nothing.
	sed -i '/^\/\/ \tprotoc  *v/d' "$out/internal/gen/envd/$p/$p.pb.go"
done
