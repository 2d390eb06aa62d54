package disk

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

// aheadKinds is how many combinations of layers and size are held ready.
const aheadKinds = 4

// ahead holds disks ready: complete and mounted, under an ID of their own. To
// give one away is to rename its image file and its directory; the mounts go
// along. A crash between the two renames leaves two halves, each of which List
// or the next Open finds.
type ahead struct {
	d      *Disks
	cancel context.CancelFunc
	done   chan struct{}
	wake   chan struct{}

	mu    sync.Mutex
	kinds []*kind   // most recently used first
	last  time.Time // when a disk was given away
}

// refillAfter is how long the processors are left to whoever took a disk, and
// now boots a guest, as long as half the disks of the kind are still ready.
const refillAfter = 250 * time.Millisecond

type kind struct {
	key   string
	spec  Spec // without ID
	ready []string
}

func newAhead(d *Disks) *ahead {
	return &ahead{d: d, done: make(chan struct{}), wake: make(chan struct{}, 1)}
}

func kindKey(s Spec) string {
	var b strings.Builder
	for _, l := range s.Layers {
		fmt.Fprintf(&b, "%s ", l.Digest)
	}
	fmt.Fprint(&b, s.SizeMB)
	return b.String()
}

func (a *ahead) start() {
	ctx, cancel := context.WithCancel(context.Background())
	a.cancel = cancel
	go func() {
		defer close(a.done)
		for {
			select {
			case <-ctx.Done():
				return
			case <-a.wake:
				a.fill(ctx)
			}
		}
	}()
}

// close stops the filler, waits for it, and removes what is ready.
func (a *ahead) close() error {
	a.cancel()
	<-a.done
	a.mu.Lock()
	kinds := a.kinds
	a.kinds = nil
	a.mu.Unlock()
	return a.drop(kinds)
}

func (a *ahead) drop(kinds []*kind) error {
	var errs []error
	for _, k := range kinds {
		for _, id := range k.ready {
			errs = append(errs, a.d.remove(context.Background(), id))
		}
	}
	return errors.Join(errs...)
}

// want notes that the spec's kind is in use and returns it, with the kinds
// that are no longer held. The caller holds mu.
func (a *ahead) want(s Spec) (*kind, []*kind) {
	key := kindKey(s)
	i := slices.IndexFunc(a.kinds, func(k *kind) bool { return k.key == key })
	var k *kind
	if i >= 0 {
		k = a.kinds[i]
		a.kinds = slices.Delete(a.kinds, i, i+1)
	} else {
		s.ID = ""
		s.Layers = slices.Clone(s.Layers)
		k = &kind{key: key, spec: s}
	}
	a.kinds = slices.Insert(a.kinds, 0, k)
	var old []*kind
	if len(a.kinds) > aheadKinds {
		old = slices.Clone(a.kinds[aheadKinds:])
		a.kinds = a.kinds[:aheadKinds]
	}
	return k, old
}

// take gives a ready disk to the spec's ID. It reports false when none is
// ready or the ID is taken; make then decides. The caller holds the ID's lock.
func (a *ahead) take(s Spec) (Root, bool) {
	a.mu.Lock()
	k, old := a.want(s)
	var id string
	if n := len(k.ready); n > 0 {
		id, k.ready = k.ready[n-1], k.ready[:n-1]
		a.last = time.Now()
	}
	a.mu.Unlock()
	a.poke()
	if err := a.drop(old); err != nil {
		a.d.log().Warn("removing disks held ready for a template that is out of use", "err", err)
	}
	if id == "" {
		return Root{}, false
	}
	root, err := a.give(id, s.ID)
	if err != nil {
		a.d.log().Warn("a disk held ready cannot be used", "disk", s.ID, "err", err)
		// Whichever half has which name, both go.
		if err := a.d.remove(context.Background(), id); err != nil {
			a.d.log().Warn("removing a disk held ready", "err", err)
		}
		return Root{}, false
	}
	return root, true
}

func (a *ahead) give(from, to string) (Root, error) {
	d := a.d
	dir := filepath.Join(d.path(disksDir), to)
	root := filepath.Join(dir, rootName)
	// The mounts are looked at, not remembered.
	if ok, err := isMountPoint(filepath.Join(d.path(disksDir), from, rootName)); err != nil || !ok {
		return Root{}, fmt.Errorf("the disk %s is not mounted (%v)", from, err)
	}
	if _, err := os.Lstat(dir); err == nil {
		return Root{}, os.ErrExist
	}
	if err := d.step("give the image"); err != nil {
		return Root{}, err
	}
	if err := os.Rename(d.imageFile(from), d.imageFile(to)); err != nil {
		return Root{}, err
	}
	err := d.step("give the directory")
	if err == nil {
		err = os.Rename(d.path(disksDir, from), dir)
	}
	if err != nil {
		return Root{}, errors.Join(err, os.Rename(d.imageFile(to), d.imageFile(from)))
	}
	return Root{Path: root, Image: d.imageFile(to)}, nil
}

func (a *ahead) poke() {
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

// Prepare asks for ready disks of the spec's kind; its ID is not used. It does
// not wait.
func (d *Disks) Prepare(s Spec) error {
	a, err := d.isOpen()
	if err != nil || a == nil {
		return err
	}
	s.ID = "x"
	if err := checkSpec(s); err != nil {
		return err
	}
	a.mu.Lock()
	_, old := a.want(s)
	a.mu.Unlock()
	a.poke()
	return a.drop(old)
}

// fill makes disks until every kind has enough, or one fails; a failure is
// tried again with the next Create.
func (a *ahead) fill(ctx context.Context) {
	for ctx.Err() == nil {
		a.mu.Lock()
		k, wait := a.lacking()
		a.mu.Unlock()
		if k == nil {
			return
		}
		if wait > 0 {
			select {
			case <-ctx.Done():
			case <-a.wake: // perhaps nothing is left now
			case <-time.After(wait):
			}
			continue
		}
		if err := a.add(ctx, k); err != nil {
			if ctx.Err() == nil {
				a.d.log().Warn("preparing a disk ahead", "err", err)
			}
			return
		}
	}
}

// lacking returns a kind that has too few disks, the emptiest first, and how
// long to wait before one is made. The caller holds mu.
func (a *ahead) lacking() (*kind, time.Duration) {
	var least *kind
	for _, k := range a.kinds {
		if len(k.ready) < a.d.Ahead && (least == nil || len(k.ready) < len(least.ready)) {
			least = k
		}
	}
	if least == nil || 2*len(least.ready) < a.d.Ahead {
		return least, 0
	}
	return least, refillAfter - time.Since(a.last)
}

func (a *ahead) add(ctx context.Context, k *kind) error {
	var b [8]byte
	rand.Read(b[:])
	s := k.spec
	s.ID = readyStart + hex.EncodeToString(b[:])
	if err := a.d.admit(ctx, s); err != nil {
		return err
	}
	if _, err := a.d.make(ctx, s); err != nil {
		return err
	}
	a.mu.Lock()
	held := slices.Contains(a.kinds, k)
	if held {
		k.ready = append(k.ready, s.ID)
	}
	a.mu.Unlock()
	if !held { // out of use meanwhile
		return a.d.remove(ctx, s.ID)
	}
	return nil
}
