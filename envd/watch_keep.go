package envd

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	pb "github.com/cayhq/cay/internal/gen/envd/filesystem"
)

// A watcher that is polled goes on in the envd after this one, under its ID.
// PID 1 gets its inotify instance, in which gathers what happens meanwhile, and
// a nameless file with what has come out of that and was not taken yet. To PID 1
// both are files of a process.

// firstWatcher is the first of the numbers of watchers in messages. No process
// has so high a one (PID_MAX_LIMIT is 1<<22).
const firstWatcher = 1 << 31

// Files of a watcher in messages.
const (
	fileInotify = iota
	fileWatcher
)

// keptItems is how many things a line of a kept watcher has at most, so that
// neither side needs all of it in its memory at once.
const keptItems = 512

// keptWatcher is the first line of a watcher's file: what it watches, and for
// whom. Lines of keptPart follow.
type keptWatcher struct {
	ID        string   `json:"id"`
	User      string   `json:"user"`
	UID       uint32   `json:"uid"`
	GID       uint32   `json:"gid"`
	Groups    []uint32 `json:"groups"`
	Home      string   `json:"home"`
	Path      string   `json:"path"`
	Recursive bool     `json:"recursive,omitempty"`
	Entries   bool     `json:"entries,omitempty"`
	Network   bool     `json:"network,omitempty"`
	Fences    int      `json:"fences,omitempty"`
	Hidden    uint32   `json:"hidden,omitempty"`
	// Temporary is the key of the names that events may have and no client sees.
	Temporary []byte `json:"temporary"`
	// Code and Error are why no more events come.
	Code  connect.Code `json:"code,omitempty"`
	Error string       `json:"error,omitempty"`
}

// keptPart is a part of what a watcher has, in its order. Nodes come first, and
// are named by their numbers from then on.
type keptPart struct {
	Nodes   []keptNode     `json:"nodes,omitempty"`
	Moving  map[uint32]int `json:"moving,omitempty"`
	Waiting []int          `json:"waiting,omitempty"`
	Doubts  []keptDoubt    `json:"doubts,omitempty"`
	Raw     []keptRaw      `json:"raw,omitempty"`
	Changes []keptChange   `json:"changes,omitempty"`
}

// Names are bytes, for they need not be UTF-8.
type (
	keptNode struct {
		Parent int    `json:"p"` // before it in the order; -1: none
		Name   []byte `json:"n,omitempty"`
		Wd     int32  `json:"w,omitempty"`
		How    scan   `json:"h,omitempty"`
		Child  bool   `json:"c,omitempty"` // its parent knows it by its name
		Waits  bool   `json:"q,omitempty"`
		Claims bool   `json:"x,omitempty"`
		Missed int    `json:"m,omitempty"`
	}
	keptDoubt struct {
		Dir  int    `json:"d"`
		Name []byte `json:"n"`
	}
	keptRaw struct {
		Wd       int32  `json:"w"`
		Mask     uint32 `json:"m"`
		Cookie   uint32 `json:"c,omitempty"`
		Name     []byte `json:"n,omitempty"`
		Replaces bool   `json:"r,omitempty"`
	}
	keptChange struct {
		Kind pb.EventType `json:"k"`
		Name []byte       `json:"n"`
	}
)

// nodes returns all nodes that the tree names, each after its parent and the
// root first, and their places in that order.
func (t *tree) nodes() ([]*node, map[*node]int) {
	var all []*node
	number := map[*node]int{}
	var add func(*node)
	add = func(n *node) {
		if _, ok := number[n]; n == nil || ok {
			return
		}
		add(n.parent)
		if _, ok := number[n]; ok {
			return // as a child of its parent
		}
		number[n] = len(all)
		all = append(all, n)
		for _, c := range n.children {
			add(c)
		}
	}
	add(t.root)
	for _, n := range t.dirs {
		add(n)
	}
	for _, n := range t.moving {
		add(n)
	}
	for _, n := range t.waiting {
		add(n)
	}
	for _, d := range t.doubts {
		add(d.dir)
	}
	return all, number
}

// save writes down all that the watcher knows. w.mu is held.
func (w *watcher) save(id string, out io.Writer) error {
	b := bufio.NewWriter(out)
	enc := json.NewEncoder(b)
	k := keptWatcher{ID: id, User: w.u.name, UID: w.u.uid, GID: w.u.gid, Groups: w.u.groups, Home: w.u.home, Path: w.path,
		Recursive: w.recursive, Entries: w.entries, Network: w.network, Fences: w.fences, Hidden: w.queue.hidden, Temporary: tempKey.get()}
	if w.err != nil {
		f := asFault(w.err)
		k.Code, k.Error = f.code, f.Error()
	}
	errs := []error{enc.Encode(k)}
	all, number := w.nodes()
	inLines(all, func(some []*node) {
		var p keptPart
		for _, n := range some {
			kn := keptNode{Parent: -1, Name: []byte(n.name), Wd: n.wd, How: n.how, Waits: n.waits, Claims: n.claims, Missed: n.missed}
			if n.parent != nil {
				kn.Parent, kn.Child = number[n.parent], n.parent.children[n.name] == n
			}
			p.Nodes = append(p.Nodes, kn)
		}
		errs = append(errs, enc.Encode(p))
	})
	rest := keptPart{Moving: map[uint32]int{}}
	for cookie, n := range w.moving {
		rest.Moving[cookie] = number[n]
	}
	for _, n := range w.waiting {
		rest.Waiting = append(rest.Waiting, number[n])
	}
	for _, d := range w.doubts {
		rest.Doubts = append(rest.Doubts, keptDoubt{number[d.dir], []byte(d.name)})
	}
	errs = append(errs, enc.Encode(rest))
	inLines(w.queue.events[w.queue.next:], func(some []raw) {
		var p keptPart
		for _, r := range some {
			p.Raw = append(p.Raw, keptRaw{r.wd, r.mask, r.cookie, []byte(r.name), r.replaces})
		}
		errs = append(errs, enc.Encode(p))
	})
	inLines(w.events, func(some []change) {
		var p keptPart
		for _, c := range some {
			p.Changes = append(p.Changes, keptChange{c.kind, []byte(c.name)})
		}
		errs = append(errs, enc.Encode(p))
	})
	return errors.Join(append(errs, b.Flush())...)
}

// inLines calls f with a line's share of a list after the other.
func inLines[T any](all []T, f func([]T)) {
	for len(all) > 0 {
		n := min(len(all), keptItems)
		f(all[:n])
		all = all[n:]
	}
}

// loadWatcher makes a watcher of what save wrote, without its inotify instance.
func loadWatcher(s *Server, in io.Reader) (w *watcher, id string, err error) {
	dec := json.NewDecoder(in)
	var k keptWatcher
	if err := dec.Decode(&k); err != nil {
		return nil, "", fmt.Errorf("decoding what is kept of a watcher: %w", err)
	}
	if k.ID == "" {
		return nil, "", errors.New("a watcher that was kept has no ID")
	}
	tempKey.inherit(k.Temporary)
	w = newWatcher(s, &user{name: k.User, uid: k.UID, gid: k.GID, groups: k.Groups, home: k.Home}, k.Path)
	w.recursive, w.entries, w.network, w.fences = k.Recursive, k.Entries, k.Network, k.Fences
	if k.Error != "" {
		w.err = faultf(k.Code, "%s", k.Error)
	}
	var all []*node
	for {
		var p keptPart
		switch err := dec.Decode(&p); {
		case errors.Is(err, io.EOF) && len(all) == 0:
			return nil, "", errors.New("a watcher that was kept has no tree")
		case errors.Is(err, io.EOF):
			w.queue.hidden = k.Hidden
			return w, k.ID, nil
		case err != nil:
			return nil, "", fmt.Errorf("decoding what is kept of watcher %s: %w", k.ID, err)
		}
		if all, err = w.load(p, all); err != nil {
			return nil, "", fmt.Errorf("watcher %s: %w", k.ID, err)
		}
	}
}

// load adds a part to a watcher, and its nodes to all.
func (w *watcher) load(p keptPart, all []*node) ([]*node, error) {
	for _, kn := range p.Nodes {
		n := &node{name: string(kn.Name), wd: kn.Wd, how: kn.How, waits: kn.Waits, claims: kn.Claims, missed: kn.Missed}
		switch {
		case kn.Parent >= len(all), kn.Parent < 0 && kn.Child:
			return nil, errors.New("a directory that was kept comes before its parent")
		case kn.Child:
			n.put(all[kn.Parent], n.name)
		case kn.Parent >= 0:
			n.parent = all[kn.Parent]
		}
		if len(all) == 0 {
			w.root = n
		}
		if n.wd != 0 {
			w.dirs[n.wd] = n
		}
		all = append(all, n)
	}
	at := func(i int) (*node, error) {
		if i < 0 || i >= len(all) {
			return nil, errors.New("a directory that was kept is missing")
		}
		return all[i], nil
	}
	for cookie, i := range p.Moving {
		n, err := at(i)
		if err != nil {
			return nil, err
		}
		w.moving[cookie] = n
	}
	for _, i := range p.Waiting {
		n, err := at(i)
		if err != nil {
			return nil, err
		}
		w.waiting = append(w.waiting, n)
	}
	for _, d := range p.Doubts {
		n, err := at(d.Dir)
		if err != nil {
			return nil, err
		}
		w.doubts = append(w.doubts, doubt{n, string(d.Name)})
	}
	for _, kr := range p.Raw {
		r := raw{kr.Wd, kr.Mask, kr.Cookie, string(kr.Name), kr.Replaces}
		w.queue.events = append(w.queue.events, r)
		w.queue.cost += r.cost()
	}
	for _, c := range p.Changes {
		w.events = append(w.events, change{string(c.Name), c.Kind})
		w.cost += changeSize + len(c.Name)
	}
	return all, nil
}

// leave ends the watchers that are streams, after what they know by now, and
// opens no new ones. Those that are polled can be until handOver.
func (ws *watchers) leave() {
	ws.mu.Lock()
	ws.closed = true
	streams := map[*watcher]bool{}
	for w := range ws.open {
		streams[w] = true
	}
	for _, w := range ws.byID {
		delete(streams, w)
	}
	ws.mu.Unlock()
	for w := range streams {
		w.sync()
		w.mu.Lock()
		w.fail(errEnded)
		w.mu.Unlock()
	}
}

// handOver gives the watchers that are polled to PID 1, for the next envd.
func (ws *watchers) handOver(k *keeperConn) (errs []error) {
	ws.mu.Lock()
	polled := ws.byID
	ws.byID = map[string]*watcher{}
	ws.mu.Unlock()
	number := uint32(firstWatcher)
	for id, w := range polled {
		if err := w.handOver(k, id, number); err != nil {
			errs = append(errs, fmt.Errorf("handing over watcher %s: %w", id, err))
		}
		number++
	}
	return errs
}

// handOver stops a watcher and gives it to PID 1 under a number.
func (w *watcher) handOver(k *keeperConn, id string, number uint32) error {
	fd, err := unix.MemfdCreate("watcher", unix.MFD_CLOEXEC)
	if err != nil {
		return err
	}
	kept := os.NewFile(uintptr(fd), "watcher")
	defer kept.Close()
	w.mu.Lock()
	inotify := w.file
	if inotify == nil {
		w.mu.Unlock()
		return nil // somebody has just removed it
	}
	w.file = nil // nothing is taken out of it any more
	err = w.save(id, kept)
	w.mu.Unlock()
	defer w.close()
	defer inotify.Close()
	if err != nil {
		return err
	}
	k.tell(keepProcess, number, []byte{1<<fileInotify | 1<<fileWatcher}, inotify, kept)
	return nil
}

// takeOver goes on with a watcher of the envd before this one.
func (ws *watchers) takeOver(s *Server, m packet) error {
	if len(m.fds) != 2 || len(m.body) == 0 || m.body[0] != 1<<fileInotify|1<<fileWatcher {
		for _, fd := range m.fds {
			unix.Close(fd)
		}
		return errors.New("a watcher that was kept has no files")
	}
	inotify, kept := os.NewFile(uintptr(m.fds[fileInotify]), "inotify"), os.NewFile(uintptr(m.fds[fileWatcher]), "watcher")
	defer kept.Close()
	// By its place in the file: where the writer's has been is shared.
	w, id, err := loadWatcher(s, bufio.NewReader(io.NewSectionReader(kept, 0, 1<<62)))
	if err == nil {
		w.conn, err = inotify.SyscallConn()
	}
	if err != nil {
		inotify.Close()
		return err
	}
	w.file = inotify
	ws.held.Add(int64(w.cost + w.queue.cost))
	w.live.Store(true)
	ws.mu.Lock()
	ws.open[w], ws.byID[id] = true, w
	ws.mu.Unlock()
	if w.err == nil {
		go w.run()
	}
	return nil
}
