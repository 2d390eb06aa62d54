package envd

import (
	"bytes"
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// raw is an event of the kernel (inotify(7)).
type raw struct {
	wd           int32
	mask, cookie uint32
	name         string
	replaces     bool // the second half of an upload's last step: the name was there before
}

func (r raw) has(bits uint32) bool { return r.mask&bits != 0 }

// parse splits what was read of an inotify instance.
func parse(b []byte, take func(raw)) {
	for len(b) >= unix.SizeofInotifyEvent {
		r := raw{wd: int32(binary.NativeEndian.Uint32(b)), mask: binary.NativeEndian.Uint32(b[4:]), cookie: binary.NativeEndian.Uint32(b[8:])}
		size := int(binary.NativeEndian.Uint32(b[12:]))
		b = b[unix.SizeofInotifyEvent:]
		if size < 0 || size > len(b) {
			return
		}
		name, _, _ := bytes.Cut(b[:size], []byte{0})
		b = b[size:]
		r.name = string(name)
		take(r)
	}
}

// pending are the events that were read and are not judged yet, in their
// order. What a directory held when its watch began can be told from them and
// from what it holds now.
type pending struct {
	events []raw
	next   int
	cost   int

	// names are those whose meaning the events change, by their directory:
	// for each the masks of these events. It is nil until it is asked for.
	names  map[int32]map[string][]uint32
	hidden uint32 // cookie of the last upload that takes the place of a file
}

func (q *pending) empty() bool { return q.next == len(q.events) }

func (r raw) cost() int { return changeSize + len(r.name) }

func (q *pending) push(r raw) {
	if r.has(unix.IN_MOVED_FROM) && tempKind(r.name) == tempReplaces {
		q.hidden = r.cookie
	}
	r.replaces = r.has(unix.IN_MOVED_TO) && r.cookie != 0 && r.cookie == q.hidden
	if q.next > keptEvents && q.next > len(q.events)/2 {
		q.events = append(q.events[:0], q.events[q.next:]...)
		q.next = 0
	}
	q.events = append(q.events, r)
	q.cost += r.cost()
	if q.names != nil {
		q.index(r)
	}
}

// changesName reports whether a name stands for something else after r.
func (r raw) changesName() bool {
	return r.name != "" && r.has(unix.IN_CREATE|unix.IN_DELETE|unix.IN_MOVED_FROM|unix.IN_MOVED_TO) && !r.replaces
}

func (q *pending) index(r raw) {
	if !r.changesName() {
		return
	}
	of := q.names[r.wd]
	if of == nil {
		of = map[string][]uint32{}
		q.names[r.wd] = of
	}
	of[r.name] = append(of[r.name], r.mask)
}

// pop returns the next event. There must be one.
func (q *pending) pop() raw {
	r := q.events[q.next]
	q.events[q.next] = raw{}
	q.next++
	q.cost -= r.cost()
	if q.names != nil && r.changesName() {
		of := q.names[r.wd]
		if left := of[r.name][1:]; len(left) > 0 {
			of[r.name] = left
		} else if delete(of, r.name); len(of) == 0 {
			delete(q.names, r.wd)
		}
	}
	if q.empty() {
		q.events, q.next, q.names = q.events[:0], 0, nil
		if cap(q.events) > keptEvents {
			q.events = nil
		}
	}
	return r
}

// keptEvents is how many events' room an idle watcher keeps.
const keptEvents = 64

// changes returns, for each name of a watched directory that the events
// change, the mask of the first that does.
func (q *pending) changes(wd int32) map[string][]uint32 {
	if q.names == nil && !q.empty() {
		q.names = map[int32]map[string][]uint32{}
		for _, r := range q.events[q.next:] {
			q.index(r)
		}
	}
	return q.names[wd]
}

// arrives returns the directory into which the second half of a move goes, or
// 0 if that is not among the events.
func (q *pending) arrives(cookie uint32) int32 {
	for _, r := range q.events[q.next:] {
		if r.has(unix.IN_MOVED_TO) && r.cookie == cookie {
			return r.wd
		}
	}
	return 0
}
