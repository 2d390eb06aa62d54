package envd

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protojson"

	pb "github.com/cayhq/cay/internal/gen/envd/process"
)

// What processes of users are connected to is held by PID 1 too, so that the
// end of an envd ends none of them, and the next one takes them over: after a
// crash, and when envd is replaced. The messages, one a packet, are a kind, the
// process's number in four bytes, and what follows from the kind. cmd/init has
// the other end.
const (
	keepProcess   = 'k' // a set of files in one byte, a keptProcess, the descriptors
	closeFile     = 'c' // the number of a file
	forgetProcess = 'f'
	tellStatus    = 's' // a wait status in four bytes
	keepPiece     = 'p' // the number of a file, and output that nobody got
	handOver      = 'x' // all is said: start the next
	isUp          = 'u' // this envd serves
	gotPieces     = 'g' // the output that was kept of a process is here
	thatIsAll     = 'd' // from PID 1: these were the processes
)

// Numbers of a process's files in messages.
const (
	fileStdin = iota
	fileStdout
	fileStderr
	filePTY
	fileCount
)

const (
	messageHead = 5
	maxPacket   = 128 << 10
	// maxRecord bounds what is kept of a process: one with very many arguments
	// or variables is listed without them by the next envd.
	maxRecord = 32 << 10
)

// holdTime is how long the output of a process that was taken over waits for a
// reader to come back. Then it is dropped, as it is without any reader.
const holdTime = 10 * time.Second

// keptProcess is what the next envd learns of a process.
type keptProcess struct {
	Config  json.RawMessage `json:"config"`
	Tag     *string         `json:"tag,omitempty"`
	Started time.Time       `json:"started"`
	// Deadline is the guest's age at which the process is killed; 0: never.
	Deadline time.Duration `json:"deadline,omitempty"`
	// End is how it ended, if it has, and Ended when.
	End   json.RawMessage `json:"end,omitempty"`
	Ended time.Time       `json:"ended,omitzero"`
}

// keeperConn is the way to PID 1. A nil one keeps nothing.
type keeperConn struct {
	conn *net.UnixConn
	mu   sync.Mutex // so that what is said of one process stays in order
}

// openKeeper takes the socket to PID 1 over.
func openKeeper(f *os.File) (*keeperConn, error) {
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("using the socket to PID 1: %w", err)
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, errors.New("the socket to PID 1 is of another kind")
	}
	return &keeperConn{conn: u}, nil
}

// tell says something of a process. Nobody may be there to hear it: then its
// files end with this envd, as they would without PID 1.
func (k *keeperConn) tell(kind byte, pid uint32, body []byte, files ...*os.File) {
	if k == nil {
		return
	}
	m := binary.LittleEndian.AppendUint32([]byte{kind}, pid)
	m = append(m, body...)
	var oob []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			rc, err := f.SyscallConn()
			if err != nil {
				return
			}
			// The file is not closed before this returns: its owner calls us.
			if err := rc.Control(func(fd uintptr) { fds[i] = int(fd) }); err != nil {
				return
			}
		}
		oob = unix.UnixRights(fds...)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	_, _, _ = k.conn.WriteMsgUnix(m, oob, nil)
}

// tellStatus says how a process ended.
func (k *keeperConn) tellStatus(pid uint32, st syscall.WaitStatus) {
	k.tell(tellStatus, pid, binary.LittleEndian.AppendUint32(nil, uint32(st)))
}

// keep has PID 1 hold what a process is connected to.
func (k *keeperConn) keep(p *process) {
	if k == nil {
		return
	}
	r := keptProcess{Tag: p.tag, Started: p.startedAt, Deadline: p.deadlineAge}
	var err error
	if r.Config, err = protojson.Marshal(p.config); err != nil || len(r.Config) > maxRecord {
		r.Config, _ = protojson.Marshal(&pb.ProcessConfig{Cmd: p.config.GetCmd(), Cwd: p.config.Cwd})
	}
	if p.end != nil {
		if r.End, err = protojson.Marshal(p.end); err != nil {
			return
		}
		r.Ended = p.endedAt
	}
	text, err := json.Marshal(r)
	if err != nil || len(text) > 2*maxRecord {
		return // a command or tag of that size is nobody's
	}
	body := []byte{0}
	var files []*os.File
	for i, f := range p.files() {
		if f != nil && p.end == nil {
			body[0] |= 1 << i
			files = append(files, f)
		}
	}
	k.tell(keepProcess, p.pid, append(body, text...), files...)
}

// files are what the process is connected to, by their numbers.
func (p *process) files() [fileCount]*os.File {
	return [fileCount]*os.File{p.stdin, p.stdout, p.stderr, p.pty}
}

// packet is one message.
type packet struct {
	kind byte
	pid  uint32
	body []byte
	fds  []int
}

// next waits for a message of PID 1.
func (k *keeperConn) next(buf, oob []byte) (packet, error) {
	n, oobn, _, _, err := k.conn.ReadMsgUnix(buf, oob)
	if err != nil {
		return packet{}, fmt.Errorf("reading what PID 1 keeps: %w", err)
	}
	m, err := parsePacket(buf[:n])
	if err != nil {
		return packet{}, err
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return m, nil // no descriptors
	}
	for i := range msgs {
		if fds, err := unix.ParseUnixRights(&msgs[i]); err == nil {
			m.fds = append(m.fds, fds...)
		}
	}
	return m, nil
}

func parsePacket(b []byte) (packet, error) {
	if len(b) < messageHead {
		return packet{}, errors.New("what PID 1 keeps is damaged")
	}
	return packet{kind: b[0], pid: binary.LittleEndian.Uint32(b[1:]), body: b[messageHead:]}, nil
}

// takeOver makes the processes of the envd before this one its own. What PID 1
// says later, how they end, it goes on to hear. other gets the rest: watchers.
func (ps *processes) takeOver(k *keeperConn, other func(packet) error) error {
	buf, oob := make([]byte, maxPacket), make([]byte, unix.CmsgSpace(4*fileCount))
	found := map[uint32]*process{}
	var others []packet // PID 1 does not listen before it has said all
	for {
		m, err := k.next(buf, oob)
		if err != nil {
			return err
		}
		if m.kind == thatIsAll {
			break
		}
		p := found[m.pid]
		switch {
		case m.kind == keepProcess && m.pid >= firstWatcher:
			m.body = bytes.Clone(m.body) // the buffer is used again
			others = append(others, m)
		case m.kind == keepProcess:
			if p, err = adopt(m); err != nil {
				ps.log.Warn("a process of the envd before cannot be taken over", "pid", m.pid, "err", err)
				k.tell(forgetProcess, m.pid, nil)
				continue
			}
			found[m.pid] = p
		case p == nil:
		case m.kind == tellStatus && len(m.body) == 4 && p.orphan != nil:
			p.orphan.tell(syscall.WaitStatus(binary.LittleEndian.Uint32(m.body)))
		case m.kind == keepPiece && len(m.body) > 1 && m.body[0] < fileCount:
			p.held[m.body[0]] = append(p.held[m.body[0]], m.body[1:]...)
		}
	}
	for _, m := range others {
		k.tell(forgetProcess, m.pid, nil) // before anything is taken out of it
		if err := other(m); err != nil {
			ps.log.Warn("a watcher of the envd before cannot be taken over", "err", err)
		}
	}
	for pid, p := range found {
		k.tell(gotPieces, pid, nil)
		if p.end != nil {
			ps.retire(p)
			k.tell(forgetProcess, pid, nil)
			continue
		}
		if !p.orphan.told() && unix.Kill(int(pid), 0) == unix.ESRCH {
			p.orphan.tell(lostStatus) // it ended while nobody looked
		}
		if p.deadlineAge > 0 {
			p.deadline = time.AfterFunc(p.deadlineAge-sinceBoot(), p.kill)
		}
		ps.add(p)
		go p.follow(ps)
	}
	go func() {
		// A goroutine that ends with the socket, and so with PID 1 or envd.
		for {
			m, err := k.next(buf, oob)
			if err != nil {
				return
			}
			if p := found[m.pid]; p != nil && p.orphan != nil && m.kind == tellStatus && len(m.body) == 4 {
				p.orphan.tell(syscall.WaitStatus(binary.LittleEndian.Uint32(m.body)))
				delete(found, m.pid)
			}
		}
	}()
	return nil
}

// adopt makes a process of what PID 1 kept.
func adopt(m packet) (p *process, err error) {
	var files [fileCount]*os.File
	for i, fds := 0, m.fds; i < fileCount && len(m.body) > 0; i++ {
		if m.body[0]&(1<<i) == 0 || len(fds) == 0 {
			continue
		}
		unix.CloseOnExec(fds[0])
		files[i], fds = os.NewFile(uintptr(fds[0]), "kept"), fds[1:]
	}
	p = &process{pid: m.pid, inMu: make(chan struct{}, 1), done: make(chan struct{}),
		stdin: files[fileStdin], stdout: files[fileStdout], stderr: files[fileStderr], pty: files[filePTY]}
	made := p // the result is nil where an error is returned
	defer func() {
		if err != nil {
			made.closeFiles()
		}
	}()
	if len(m.body) == 0 {
		return nil, errors.New("nothing is kept of it")
	}
	var r keptProcess
	if err := json.Unmarshal(m.body[1:], &r); err != nil {
		return nil, fmt.Errorf("decoding what is kept of it: %w", err)
	}
	p.config = &pb.ProcessConfig{}
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(r.Config, p.config); err != nil {
		return nil, fmt.Errorf("decoding its configuration: %w", err)
	}
	p.tag, p.startedAt, p.deadlineAge = r.Tag, r.Started, r.Deadline
	if len(r.End) > 0 {
		p.end, p.endedAt = &pb.ProcessEvent_EndEvent{}, r.Ended
		if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(r.End, p.end); err != nil {
			return nil, fmt.Errorf("decoding its end: %w", err)
		}
		close(p.done)
		return p, nil
	}
	if p.pty == nil && (p.stdout == nil || p.stderr == nil) {
		return nil, errors.New("its output is missing")
	}
	p.orphan = newOrphan()
	return p, nil
}

// lostStatus stands for a status that nobody knows.
const lostStatus = syscall.WaitStatus(0xffff_ffff)

var errLostStatus = errors.New("ended while envd was away; its status is not known")

// orphan is a process whose parent is PID 1, since the envd that started it has
// ended.
type orphan struct {
	once   sync.Once
	ended  chan struct{} // closed when status is known
	status syscall.WaitStatus

	joinOnce sync.Once
	joined   chan struct{} // closed when a reader has come back, or is not awaited any more
}

func newOrphan() *orphan {
	o := &orphan{ended: make(chan struct{}), joined: make(chan struct{})}
	time.AfterFunc(holdTime, o.join)
	return o
}

func (o *orphan) tell(st syscall.WaitStatus) {
	o.once.Do(func() { o.status = st; close(o.ended) })
}

func (o *orphan) told() bool {
	select {
	case <-o.ended:
		return true
	default:
		return false
	}
}

func (o *orphan) join() { o.joinOnce.Do(func() { close(o.joined) }) }
