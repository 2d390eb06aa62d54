package gvisor

import (
	"crypto/sha256"
	"encoding/hex"
	"path/filepath"

	"github.com/cayhq/cay/runtime"
)

// home is the directory of one supervisor.
type home string

func (h home) socket() string    { return filepath.Join(string(h), "supervisor.sock") }
func (h home) roots() string     { return filepath.Join(string(h), "root.sock") }
func (h home) lock() string      { return filepath.Join(string(h), "supervisor.lock") }
func (h home) log() string       { return filepath.Join(string(h), "supervisor.log") }
func (h home) shared() string    { return filepath.Join(string(h), "shared") }
func (h home) instances() string { return filepath.Join(string(h), "i") }

// tag tells the host objects of this directory from those of another on the
// same machine.
func (h home) tag() string {
	sum := sha256.Sum256([]byte(h))
	return hex.EncodeToString(sum[:4])
}

// cgroupParent is the cgroup that holds those of the instances.
func (h home) cgroupParent() string { return "/cay-" + h.tag() }

// layout is where the objects of one instance are.
type layout struct {
	dir        string // everything of the instance; also gVisor's bundle
	record     string // instance.json: what a new supervisor adopts it by
	spec       string // config.json: what gVisor runs
	console    string // the pipe the guest writes to
	log        string // what was read from it, as log.0 and log.1
	panicLog   string // the engine's last words
	engineRoot string // gVisor's state and control socket
	shared     string
	cgroup     string // path below every cgroup hierarchy
}

func (h home) instance(id runtime.InstanceID) layout {
	dir := filepath.Join(h.instances(), string(id))
	return layout{
		dir:        dir,
		record:     filepath.Join(dir, "instance.json"),
		spec:       filepath.Join(dir, "config.json"),
		console:    filepath.Join(dir, "console"),
		log:        filepath.Join(dir, "log"),
		panicLog:   filepath.Join(dir, "panic.log"),
		engineRoot: filepath.Join(dir, "r"),
		shared:     h.shared(),
		cgroup:     filepath.Join(h.cgroupParent(), string(id)),
	}
}
