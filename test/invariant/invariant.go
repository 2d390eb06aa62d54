// Package invariant reads what a server has on its host from the host itself,
// and says what is left over. It asks the kernel and the files; it uses no
// code of the product and believes no word of it.
//
// A [Snapshot] counts things by class: a class is a thing's kind and its name
// with everything that differs from one sandbox to the next cut out of it. So
// a warm pool that has the same number of slots as before has left nothing,
// although they are other slots; and after `cay down` every class must be back
// at what it was before `cay up`.
//
// It takes everything it sees as the server's. It is meant for the machine of
// test/program, where that is so.
package invariant

import (
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// Scope says where to look for what cannot be told by looking everywhere.
type Scope struct {
	// DataDir is the server's data directory.
	DataDir string
	// Cgroups are names of directories in the roots of the cgroup hierarchies.
	Cgroups []string
	// Dirs are further directories in which a server makes files, such as
	// those of named network namespaces.
	Dirs []string
}

// Kind is the kind of a thing.
type Kind string

// The kinds.
const (
	Process   Kind = "process"
	Zombie    Kind = "zombie"
	Namespace Kind = "namespace"
	Link      Kind = "link"
	Firewall  Kind = "nftables"
	Cgroup    Kind = "cgroup"
	Mount     Kind = "mount"
	Loop      Kind = "loop device"
	Socket    Kind = "socket"
	Open      Kind = "descriptor"
	File      Kind = "file"
	Row       Kind = "row"
	Setting   Kind = "setting"
)

// Kinds lists every kind.
var Kinds = []Kind{Process, Zombie, Namespace, Link, Firewall, Cgroup, Mount, Loop, Socket, Open, File, Row, Setting}

type class struct {
	Kind Kind
	Name string
}

// Snapshot is what was there at one time: the things of each class.
type Snapshot map[class][]string

// Count returns how many things of a kind there are.
func (s Snapshot) Count(k Kind) int {
	n := 0
	for c, things := range s {
		if c.Kind == k {
			n += len(things)
		}
	}
	return n
}

// Things returns the things of a kind.
func (s Snapshot) Things(k Kind) []string {
	var out []string
	for c, things := range s {
		if c.Kind == k {
			out = append(out, things...)
		}
	}
	slices.Sort(out)
	return out
}

func (s Snapshot) add(scope Scope, k Kind, name, thing string) {
	c := class{k, scope.normal(name)}
	s[c] = append(s[c], thing)
}

// What makes the name of a thing its own.
var ownParts = []struct {
	pattern *regexp.Regexp
	to      string
}{
	{regexp.MustCompile(`\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b`), "<uuid>"},
	{regexp.MustCompile(`\bx[a-z0-9]{16}\b`), "<execution>"},
	{regexp.MustCompile(`\bi[a-z0-9]{20}\b`), "<sandbox>"},
	{regexp.MustCompile(`\bready-[A-Za-z0-9]+\b`), "ready-<id>"},
	{regexp.MustCompile(`\b[0-9a-f]{32,}\b`), "<digest>"},
	{regexp.MustCompile(`[0-9]+`), "N"},
}

// normal cuts out of a name what differs between two things of a class.
func (s Scope) normal(name string) string {
	if s.DataDir != "" {
		name = strings.ReplaceAll(name, s.DataDir, "<data>")
	}
	for _, p := range ownParts {
		name = p.pattern.ReplaceAllString(name, p.to)
	}
	return name
}

// Take looks at the host.
func Take(scope Scope) (Snapshot, error) {
	s := Snapshot{}
	var errs []error
	for _, look := range []struct {
		at string
		do func(Snapshot, Scope) error
	}{
		{"processes", processes}, {"links", links}, {"nftables", firewall}, {"cgroups", cgroups},
		{"mounts", mounts}, {"loop devices", loops}, {"sockets", sockets}, {"files", files},
		{"the database", rows}, {"settings", settings},
	} {
		if err := look.do(s, scope); err != nil {
			errs = append(errs, fmt.Errorf("looking at %s: %w", look.at, err))
		}
	}
	return s, errors.Join(errs...)
}

// shown is how many things of a class a difference names.
const shown = 4

// Diff says what after has more than before, a line for each class. Nothing is
// left over when it is empty.
func Diff(before, after Snapshot) []string {
	var out []string
	classes := slices.SortedFunc(maps.Keys(after), func(a, b class) int {
		return strings.Compare(string(a.Kind)+a.Name, string(b.Kind)+b.Name)
	})
	for _, c := range classes {
		had, has := before[c], after[c]
		if len(has) <= len(had) {
			continue
		}
		fresh := slices.DeleteFunc(slices.Clone(has), func(thing string) bool { return slices.Contains(had, thing) })
		if len(fresh) == 0 {
			fresh = has
		}
		list := strings.Join(fresh[:min(shown, len(fresh))], ", ")
		if len(fresh) > shown {
			list += ", …"
		}
		out = append(out, fmt.Sprintf("%d more of %s %s: %s", len(has)-len(had), c.Kind, c.Name, list))
	}
	return out
}

// Settle waits until nothing is left over, and fails the test with what is
// left after the given time.
func Settle(t testing.TB, within time.Duration, scope Scope, before Snapshot) Snapshot {
	t.Helper()
	for end := time.Now().Add(within); ; time.Sleep(100 * time.Millisecond) {
		now, err := Take(scope)
		if err != nil {
			t.Fatal(err)
		}
		left := Diff(before, now)
		if len(left) == 0 {
			return now
		}
		if time.Now().After(end) {
			t.Fatalf("left over after %s:\n  %s", within, strings.Join(left, "\n  "))
		}
	}
}

// Steady waits until the host does not change any more, as far as a snapshot
// shows, and returns what is there then.
func Steady(t testing.TB, within time.Duration, scope Scope) Snapshot {
	t.Helper()
	var last Snapshot
	same := 0
	for end := time.Now().Add(within); ; time.Sleep(100 * time.Millisecond) {
		now, err := Take(scope)
		if err != nil {
			t.Fatal(err)
		}
		if last != nil && len(Diff(last, now)) == 0 && len(Diff(now, last)) == 0 {
			if same++; same == 5 {
				return now
			}
		} else {
			same = 0
		}
		if last = now; time.Now().After(end) {
			t.Fatalf("the host still changes after %s", within)
		}
	}
}
