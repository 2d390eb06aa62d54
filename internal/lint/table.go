package lint

// Kind says what a package is, and so what it may import.
type Kind string

// The kinds.
const (
	Root      Kind = "root"      // the vocabulary: standard library only
	Contract  Kind = "contract"  // an interface: the root only
	Suite     Kind = "suite"     // the proof of a contract, run against every adapter
	Adapter   Kind = "adapter"   // one technology behind a contract
	Service   Kind = "service"   // a role: contracts and mechanisms
	Mechanism Kind = "mechanism" // part of a machine: network, disk
	Guest     Kind = "guest"     // runs inside sandboxes
	Data      Kind = "data"      // files, embedded
	Internal  Kind = "internal"  // a small tool, one noun
	Generated Kind = "generated" // written by a program, below internal/gen
	Command   Kind = "command"   // wires: flags, environment, files
	Test      Kind = "test"      // whole-program tests and measurements
)

// Package is a row of the table of packages.
type Package struct {
	Path    string // from the module's root; "." is the root
	Kind    Kind
	Purpose string // one line
}

// Packages names every package of the module. A new package is entered here in
// the commit that adds it.
var Packages = []Package{
	{".", Root, "the vocabulary: identifiers, states, errors, manifests, the node contract"},
	{"api", Service, "the REST control plane that the E2B clients speak to"},
	{"bench", Test, "the benchmark program, with yardsticks measured in the same run"},
	{"blob", Contract, "artefact storage: layers and manifests"},
	{"blob/blobtest", Suite, "the proof of blob, and a store in memory"},
	{"blob/file", Adapter, "artefacts in a directory"},
	{"catalog", Contract, "which sandbox is on which node, now"},
	{"catalog/catalogtest", Suite, "the proof of catalog"},
	{"catalog/memory", Adapter, "the live table in one process"},
	{"certificate", Mechanism, "the edge's certificates: from files, a local authority, ACME"},
	{"cmd/cay", Command, "the product: server, operator's tools, engine"},
	{"cmd/engine", Command, "the sandboxed engine and its supervisor, as a program"},
	{"cmd/envd", Command, "the guest's daemon, as a program"},
	{"cmd/gofer", Command, "the file server beside each sandbox, as a program"},
	{"cmd/init", Command, "PID 1 of a guest: reaps, supervises envd, never exits"},
	{"disk", Mechanism, "root directories of sandboxes from shared images and bounded files"},
	{"doctor", Service, "checks of a machine, each with its repair"},
	{"egress", Mechanism, "a guest's connections outwards, decided and changed by name"},
	{"envd", Guest, "the daemon in each sandbox: processes, files, ports"},
	{"internal/authority", Internal, "certificate authorities of a machine's own"},
	{"internal/check", Test, "runs what must pass before a commit, and counts it"},
	{"internal/cli", Internal, "the commands that talk to a server, as any client does"},
	{"internal/ctxio", Internal, "long reads that end with their context"},
	{"internal/disposition", Internal, "what the signals do that Go leaves alone"},
	{"internal/gen/api", Generated, "the public REST API, from spec/openapi.yaml"},
	{"internal/gen/envd/filesystem", Generated, "messages of spec/envd/filesystem"},
	{"internal/gen/envd/filesystem/filesystemconnect", Generated, "RPC of spec/envd/filesystem"},
	{"internal/gen/envd/process", Generated, "messages of spec/envd/process"},
	{"internal/gen/envd/process/processconnect", Generated, "RPC of spec/envd/process"},
	{"internal/gen/operator", Generated, "our own REST API for operators, from spec/operator.yaml"},
	{"internal/gen/sqlite", Generated, "queries of store/sqlite"},
	{"internal/killpoint", Internal, "the points at which tests let a server die"},
	{"internal/keyring", Internal, "seals small values under keys of a file"},
	{"internal/lint", Internal, "these rules"},
	{"internal/meminfo", Internal, "how much memory the machine has"},
	{"internal/prelude", Internal, "the first step of an engine process, before other packages initialise"},
	{"internal/rawconn", Internal, "TCP connections that Go's scheduler is not told to wait for"},
	{"internal/settings", Internal, "every setting, declared once, with its origin"},
	{"internal/wholefile", Internal, "small files, replaced whole or not at all"},
	{"network", Mechanism, "slot, address, namespace and firewall of a sandbox"},
	{"orchestrator", Service, "one machine's agent: owns its sandboxes from create to kill"},
	{"proxy", Service, "the edge: from a sandbox's URL to the guest's port"},
	{"runtime", Contract, "a sandbox engine"},
	{"runtime/gvisor", Adapter, "gVisor, linked in and started again from our own binary"},
	{"runtime/gvisor/gofer", Mechanism, "gVisor's file server without the rest of gVisor"},
	{"runtime/runtimetest", Suite, "the proof of runtime, and an engine in memory"},
	{"store", Contract, "the durable record: teams, keys, templates, builds, sandboxes"},
	{"store/sqlite", Adapter, "the durable record in one SQLite file"},
	{"store/storetest", Suite, "the proof of store"},
	{"template", Service, "recipe → image → layers → verified build"},
	{"templates", Data, "the recipes of the stock templates"},
	{"test/crash", Test, "kills servers at every point of what they do"},
	{"test/edge", Test, "browsers, command lines and programs against the edge of the whole program"},
	{"test/envd", Test, "the whole contract of the daemon in a sandbox, through the whole program"},
	{"test/invariant", Test, "reads from the host what a server has on it, and says what is left over"},
	{"test/isolation", Test, "what a guest may reach, from inside"},
	{"test/life", Test, "restarts, leaks, limits and error texts of the whole program"},
	{"test/program", Test, "runs the real binary on a machine of its own"},
	{"test/pause", Test, "the whole life of sandboxes: pauses, snapshots, forks, wakes"},
	{"test/upgrade", Test, "from one build of the product to the next, with sandboxes and snapshots"},
	{"test/sdk", Test, "the official clients, unmodified, against the whole program"},
}

// Home says which packages may import a heavy library.
type Home struct {
	Prefix string // of import paths
	Homes  []string
}

// HeavyHomes gives each heavy library its one home, so that it can be replaced
// and so that the small programs stay small. Generated code counts as the home
// of its user.
var HeavyHomes = []Home{
	{"gvisor.dev/", []string{"runtime/gvisor", "runtime/gvisor/gofer"}},
	{"modernc.org/sqlite", []string{"store/sqlite", "event/sqlite", "test/invariant"}},
	{"github.com/jackc/pgx", []string{"store/postgres"}},
	{"github.com/pressly/goose", []string{"store/sqlite", "store/postgres"}},
	{"github.com/redis/", []string{"catalog/redis"}},
	{"github.com/hashicorp/consul", []string{"discovery/consul"}},
	{"github.com/hashicorp/nomad", []string{"discovery/nomad"}},
	{"k8s.io/", []string{"discovery/kubernetes"}},
	{"github.com/ClickHouse/", []string{"event/clickhouse"}},
	{"github.com/aws/", []string{"blob/s3"}},
	{"cloud.google.com/", []string{"blob/gcs"}},
	{"github.com/google/nftables", []string{"network", "doctor", "test/invariant", "test/isolation"}},
	{"github.com/vishvananda/", []string{"network", "test/program", "test/invariant"}},
	{"github.com/getkin/kin-openapi", []string{"api", "internal/gen/api", "internal/gen/operator"}},
	{"github.com/oapi-codegen/", []string{"internal/gen/api", "internal/gen/operator"}},
	{"github.com/spf13/cobra", []string{"cmd/cay", "internal/cli"}},
	{"github.com/caddyserver/", []string{"certificate"}},
	{"github.com/libdns/", []string{"certificate"}},
	{"go.uber.org/zap", []string{"certificate"}},
	{"github.com/letsencrypt/", []string{"certificate", "test/edge"}},
	{"google.golang.org/grpc", []string{"test/edge"}},
	{"github.com/coder/websocket", []string{"test/edge"}},
	{"github.com/creack/pty", []string{"envd"}},
	{"github.com/fsnotify/fsnotify", []string{"envd"}},
}

// RefusedNames are names that say nothing about a package.
var RefusedNames = []string{"util", "utils", "common", "shared", "helper", "helpers", "misc", "base", "lib", "pkg",
	"types", "models", "consts", "constants", "manager"}

// Limits of a package's growth.
const (
	MaxDepth   = 3    // elements of a path
	MaxLines   = 1000 // of a file
	MaxMethods = 40   // exported, of one type
)

// Exception permits what a rule refuses, in one file.
type Exception struct {
	File   string
	What   string // what the finding names: a literal, a function, a type
	Reason string
}

// LargeFiles may be longer than MaxLines.
var LargeFiles = []Exception{}

// WideTypes may have more than MaxMethods exported methods.
var WideTypes = []Exception{}

// Ambient lists uses of the process's environment and flags outside cmd.
var Ambient = []Exception{
	{"internal/prelude/prelude.go", "init", "it is for what comes before everything else of an engine process, as its comment says"},
	{"internal/prelude/prelude.go", "os.Environ", "the process executes itself anew, with the environment it has"},
	{"internal/settings/settings.go", "os.LookupEnv", "the table of settings is read here for every command; a test passes its own"},
	{"envd/start.go", "os.Getenv", "the protocol: a process gets the PATH that envd was started with"},
	{"template/bootstrap.go", "os.Environ", "mmdebstrap needs the host's proxy variables"},
	{"template/image.go", "os.Environ", "mkfs.erofs needs the host's PATH; one variable is added"},
}

// HostPaths lists absolute paths in the source outside cmd and templates.
// Paths below /proc, /sys and /dev are the kernel's interface and need no row.
var HostPaths = []Exception{
	{"api/admin.go", "00000000-0000-0000-0000-000000000000", "the contract: the cluster of a control plane that has one"},
	{"certificate/trust.go", "/usr/local/share/ca-certificates", "where Debian has it"},
	{"certificate/trust.go", "/etc/pki/ca-trust/source/anchors", "where Fedora has it"},
	{"certificate/trust.go", "/etc/ca-certificates/trust-source/anchors", "where Arch has it"},
	{"certificate/trust.go", "/usr/share/pki/trust/anchors", "where SUSE has it"},
	{"doctor/network.go", "/etc/resolv.conf", "where Linux has it"},
	{"envd/control.go", "/etc/hostname", "in the guest, where Linux has it"},
	{"envd/control.go", "/etc/machine-id", "in the guest, written with its name"},
	{"envd/control.go", "/etc/hosts", "in the guest, where Linux has it"},
	{"envd/envd.go", "/etc/passwd", "in the guest; a field of Config replaces it"},
	{"envd/envd.go", "/etc/group", "in the guest; a field of Config replaces it"},
	{"envd/envd.go", "/run/cay", "in the guest: part of the contract with images"},
	{"envd/envd.go", "/etc/cay/hooks/generation", "in the guest: part of the contract with images"},
	{"envd/start.go", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "in the guest: Debian's PATH, when envd has none"},
	{"envd/trust.go", "/etc/ssl/certs/ca-certificates.crt", "in the guest, where Debian has it"},
	{"envd/trust.go", "/usr/local/share/ca-certificates/cay-egress.crt", "in the guest, where update-ca-certificates looks"},
	{"internal/cli/exec.go", "/bin/bash", "in the guest: the contract says every image has it"},
	{"internal/cli/trial.go", "/bin/bash", "in the guest: the contract says every image has it"},
	{"internal/settings/settings.go", "/var/lib/cay", "the default of a setting"},
	{"orchestrator/boot.go", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "in the guest: the PATH of PID 1"},
	{"template/image.go", "/usr/bin/cay-init", "in the guest: the agent layer puts it there"},
	{"template/image.go", "/usr/bin/envd", "in the guest: the agent layer puts it there"},
	{"template/probe.go", "/tmp/cay-probe", "in the guest that is being verified"},
	{"template/probe.go", "/bin/bash", "in the guest: the contract says every image has it"},
}
