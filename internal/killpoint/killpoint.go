// Package killpoint names the points between the steps of an operation at which the
// process may die, so that a test can have it die at every one of them. In
// production nobody is called.
package killpoint

import "strings"

// Op is an operation on a sandbox or on a snapshot.
type Op string

// The operations.
const (
	Create   Op = "create"
	Pause    Op = "pause"
	Resume   Op = "resume"
	Snapshot Op = "snapshot"
	Fork     Op = "fork"
	Kill     Op = "kill"
	Drop     Op = "drop" // a snapshot is deleted
	Upgrade  Op = "upgrade"
)

// Hook is called at each point, by its name: "pause.manifest.before-rename". It
// may end the process. Its error stands for one of the file operation that
// follows; only points at which Fails reports true heed it.
type Hook func(point string) error

// At is a point in front of a file operation.
func (h Hook) At(op Op, step string) error {
	if h == nil || op == "" {
		return nil
	}
	return h(string(op) + "." + step)
}

// Pass is a point between two steps.
func (h Hook) Pass(op Op, step string) {
	if h != nil && op != "" {
		_ = h(string(op) + "." + step) // nothing here can fail
	}
}

// Fails reports whether an error of the hook has an effect at a point: it is in
// front of a file operation.
func Fails(point string) bool {
	return strings.HasPrefix(point[strings.LastIndexByte(point, '.')+1:], "before-")
}

// Undoes reports whether a point is passed only when the operation has failed.
func Undoes(point string) bool {
	return strings.Contains(point, ".undo")
}

// Points are all of them. A test holds this list and the code together: a point
// that is not here, and one that is never passed, fails it.
func Points() []string {
	var all []string
	add := func(op Op, steps ...[]string) {
		for _, s := range steps {
			for _, step := range s {
				all = append(all, string(op)+"."+step)
			}
		}
	}
	record := func(name string) []string {
		return []string{"record." + name + ".before-write", "record." + name + ".before-rename", "record." + name + ".after"}
	}
	around := func(names ...string) (steps []string) {
		for _, n := range names {
			steps = append(steps, n+".before", n+".after")
		}
		return steps
	}
	engineUp := func() []string { return around("network", "disk", "engine", "start", "ready", "init", "route") }
	removed := func() []string { return around("unroute", "engine-gone", "disk-gone", "network-gone") }
	begun := func() []string {
		return append([]string{"directory.before-make", "directory.after"}, around("flush", "freeze", "checkpoint", "disk")...)
	}
	published := []string{"disk-kept.before", "disk-kept.after", "digest.before-read", "memory.before-sync", "secrets.before-write", "manifest.before-write",
		"directory.before-sync", "manifest.before-rename", "manifest.before-publish", "manifest.after"}
	gone := []string{"record.before-remove", "record.gone"}

	add(Create, around("api.row"), record("booting"), record("host"), engineUp(), record("running"), record("told"), around("api.outcome"), around("undo.api"))
	add(Pause, around("api.intent"), record("saving"), around("hold-back", "sync"), begun(), published,
		record("ending"), removed(), around("half-gone"), gone, around("api.outcome"),
		around("undo.drop", "undo.go-on"), record("undo"), around("undo.api"))
	add(Resume, around("api.intent"), record("booting"), record("host"), engineUp(), around("verify"), record("running"), record("told"),
		around("api.outcome"), around("undo.api"))
	add(Snapshot, around("api.intent"), record("saving"), begun(), around("thaw"), published, around("go-on"), record("running"),
		around("api.row", "api.outcome"), around("undo.drop"))
	add(Fork, []string{"api.saved", "api.made", "api.discard"})
	add(Kill, around("api.intent"), record("ending"), removed(), gone, around("api.own", "api.outcome"))
	add(Drop, around("api.row"), []string{"snapshot.before-rename", "snapshot.before-remove", "snapshot.after", "disk.after"})
	add(Upgrade, record("next"), around("send", "replace"), record("replaced"), record("settled"))
	return all
}
