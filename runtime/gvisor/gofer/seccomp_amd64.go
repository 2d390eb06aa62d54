package gofer

import _ "embed"

//go:embed seccomp_amd64.json
var seccompData []byte
